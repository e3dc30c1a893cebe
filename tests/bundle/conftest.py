"""A bundle for a CPU, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmvision_export.artifacts.deployment import DEPLOYMENTS
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.bundle.pack import write_bundle


@pytest.fixture(scope="session")
def cpu_archive(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small-cpu.tar`, which tests must not change."""
    output = tmp_path_factory.mktemp("bundles") / "small-cpu.tar"
    write_bundle(exported, Manifest.read(exported), output, DEPLOYMENTS["cpu"])
    return output
