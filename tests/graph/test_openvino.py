"""The OpenVINO flavour: its structure, and its numbers against the portable graph's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.manifest import OPENVINO_GRAPH, Manifest
from mmvision_export.core.errors import ExportError
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.graph.openvino import openvino_graph_from_portable
from mmvision_export.models.weights import WeightSource
from tests.support.configs import GRIDS, HEAD_DIM_64, HEAD_DIM_80, batch, relative_l2, run_graph


def test_structure(exported: Path) -> None:
    portable, model = (
        onnx.load(exported / name, load_external_data=False)
        for name in ("model.onnx", OPENVINO_GRAPH)
    )
    assert model.graph.input == portable.graph.input
    assert model.graph.output == portable.graph.output
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    # Every weight is the portable graph's own, read from the same place of the same file.
    theirs = {tensor.name: tensor.external_data for tensor in portable.graph.initializer}
    ours = {tensor.name: tensor.external_data for tensor in model.graph.initializer}
    assert all(ours[name] == where for name, where in theirs.items() if name.endswith("weight"))
    assert OPENVINO_GRAPH in Manifest.read(exported).files


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_is_the_portable_graph(exported: Path, grid: list[tuple[int, int, int]]) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80)
    expected = run_graph(exported / "model.onnx", pixels, rows)
    np.testing.assert_array_equal(run_graph(exported / OPENVINO_GRAPH, pixels, rows), expected)


def test_the_comparison_can_fail(exported: Path) -> None:
    """Attention across the boundary of two images is seen."""
    pixels, rows = batch(GRIDS["two of different size"], HEAD_DIM_80)
    expected = run_graph(exported / "model.onnx", pixels, rows)
    out = run_graph(exported / OPENVINO_GRAPH, pixels, np.array([[1, 10, 4]]))
    assert relative_l2(out, expected) > 1e-3


def test_float16_has_none(tmp_path: Path) -> None:
    source = WeightSource(random_config=HEAD_DIM_64, seed=1)
    export_model_directory(source, tmp_path / "m", precision="fp16")
    assert not (tmp_path / "m" / OPENVINO_GRAPH).exists()
    with pytest.raises(ExportError) as refused:
        openvino_graph_from_portable(tmp_path / "m" / "model.onnx")
    assert "float16" in str(refused.value)


def test_an_operator_without_definition_is_refused(exported: Path, tmp_path: Path) -> None:
    model = ir.load(exported / "model.onnx")
    del model.functions["mmvision", "VarlenAttention", ""]
    path = tmp_path / "model.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    with pytest.raises(ExportError) as refused:
        openvino_graph_from_portable(path)
    assert "VarlenAttention" in str(refused.value)
