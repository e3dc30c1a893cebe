"""What `inspect` says of a model directory's executable content."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmvision_export.core.errors import ManifestError
from mmvision_export.graph.inspection import inspect
from tests.support.configs import copy_of
from tests.support.engines import ENGINE, write_engine


def test_executable_content_is_listed(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    assert inspect(directory)["executable_content"] == {}
    write_engine(directory / "plans")
    (directory / "plugins").mkdir()
    (directory / "plugins" / "library.so").write_bytes(b"of somebody")
    assert inspect(directory)["executable_content"] == {
        f"plans/{ENGINE}": "built here",
        "plugins/library.so": "not built here",
    }


def test_what_a_killed_build_left_is_named_and_no_error(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    engine = write_engine(directory / "plans")
    (whole,) = inspect(directory)["engines"]
    assert "problem" not in whole
    engine.with_suffix(".json").unlink()
    (half,) = inspect(directory)["engines"]
    assert half["file"] == engine.name
    assert half["problem"]
    with pytest.raises(ManifestError):  # the control: the file itself is no engine that opens
        inspect(engine)
