"""What is held out, and what replacing a flavour needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import OutputError
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.quantize.evidence import MARGIN, losses
from mmvision_export.quantize.photographs import split
from mmvision_export.quantize.quantize import quantize
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused

BATCHES = {
    "calibration": [sample_batch(((1, 4, 4),), HEAD_DIM_80, seed=1)],
    "held_out": [sample_batch(((1, 3, 4),), HEAD_DIM_80, seed=2)],
}


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 100])
def test_at_least_a_quarter_and_eight_are_held_out(count: int) -> None:
    images = [Path(f"{index}.jpg") for index in range(count)]
    parts = split(images)
    assert sorted({*parts.calibration, *parts.held_out}) == sorted(images)
    assert len(parts.calibration) + len(parts.held_out) == count
    assert parts.calibration
    assert 4 * len(parts.held_out) >= count
    assert len(parts.held_out) * parts.views >= 8
    assert 1 <= parts.views <= 8
    assert parts.views == 1 or count < 16


def test_losses_of_tokens() -> None:
    reference = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    result = np.array([[2, 0], [1, 2], [np.nan, 1]], np.float32)
    np.testing.assert_allclose(losses(result, reference), [0, 1 - 2 / 5**0.5, np.inf], atol=1e-7)


def test_a_flavour_is_replaced_with_force_only(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old flavour is withdrawn before a file moves: what fails there leaves it absent."""
    directory = copy_of(exported, tmp_path / "m")
    options: dict[str, Any] = {**BATCHES, "min_cosine": 0.99}
    report = quantize(directory, Manifest.read(directory), "cpu-int8", **options)
    assert report.reached >= 1 - 0.01 / MARGIN
    assert report.operations == 1
    assert report.size_bytes < 0.3 * report.float_size_bytes
    before = (directory / "manifest.json").read_bytes()
    with refused(OutputError, "model.cpu-int8.onnx", reason="exists"):
        quantize(directory, Manifest.read(directory), "cpu-int8", **options)
    assert (directory / "manifest.json").read_bytes() == before

    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name.startswith("model.cpu-int8.onnx") and Path(target).parent == directory:
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError):
        quantize(directory, Manifest.read(directory), "cpu-int8", force=True, **options)
    monkeypatch.undo()
    content = json.loads((directory / "manifest.json").read_text())
    assert not [name for name in content["files"] if "int8" in name]
    assert not content["quantization"]
    manifest = Manifest.read(directory)
    manifest.verify(directory, manifest.files)
    # Absent is not there: nothing to force.
    quantize(directory, manifest, "cpu-int8", **options)
    manifest.verify(directory, manifest.files)
    assert "model.cpu-int8.onnx" in manifest.files
