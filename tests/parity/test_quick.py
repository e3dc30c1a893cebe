"""The check right after export finds a graph that is another function."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from mmvision_export.core.errors import ExportError
from mmvision_export.core.progress import Progress
from mmvision_export.export import onnx_export
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.quick import QuickCheck
from tests.support.configs import HEAD_DIM_80
from tests.support.errors import refused
from tests.support.notes import Notes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_passes(precision: str, tmp_path: Path) -> None:
    source = WeightSource(random_config=HEAD_DIM_80, seed=1)
    export_model_directory(source, tmp_path / "m", precision=precision, check=QuickCheck)


def test_bf16_is_noted(tmp_path: Path) -> None:
    notes = Notes()
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1),
        tmp_path / "m",
        precision="bf16",
        check=QuickCheck,
        progress=notes,
    )
    assert any("not checked" in note for note in notes.notes)


def test_another_function_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    trace = onnx_export.onnx_from_encoder

    def wrong(encoder: VisionEncoderModule, *, opset: int) -> ir.Model:
        dict(encoder.named_parameters())[
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
        ].data.add_(0.5)
        return trace(encoder, opset=opset)

    monkeypatch.setattr(onnx_export, "onnx_from_encoder", wrong)
    source = WeightSource(random_config=HEAD_DIM_80, seed=1)
    with refused(ExportError, "model.cpu.onnx", "--no-check"):
        export_model_directory(source, tmp_path / "m", check=QuickCheck, progress=Progress())
    assert not (tmp_path / "m").exists()
    export_model_directory(source, tmp_path / "m")  # without the check nobody notices
