"""GPUs in records and file names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.records import json_from_record, record_from_json
from tests.support.errors import refused

ORIN = Gpu(
    name="Orin (nvgpu)",
    compute_capability=ComputeCapability(8, 7),
    multiprocessors=16,
    memory_bytes=65_890_271_232,
)


def test_record_round_trips() -> None:
    assert record_from_json(Gpu, json_from_record(ORIN)) == ORIN


def test_file_name() -> None:
    assert ORIN.file_name == "orin-nvgpu-sm87-16-65890271232"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Orin Nano"},
        {"compute_capability": ComputeCapability(8, 6)},
        {"multiprocessors": 8},
        {"memory_bytes": 7_990_000_000},
    ],
)
def test_another_gpu_has_another_name(change: dict[str, Any]) -> None:
    """Of 8.7 are an AGX Orin of 16 multiprocessors and an Orin Nano of 8."""
    assert dataclasses.replace(ORIN, **change).file_name != ORIN.file_name


@pytest.mark.parametrize("field", ["multiprocessors", "memory_bytes"])
def test_numbers_are_positive(field: str) -> None:
    changed: dict[str, Any] = {field: 0}
    with refused(ManifestError, field, 0):
        dataclasses.replace(ORIN, **changed)
