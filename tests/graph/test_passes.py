"""Graphs derived from the exported one: float16 by retyping, plain ops by inlining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.core.errors import ExportError
from mmvision_export.export.onnx_export import onnx_from_encoder
from mmvision_export.graph.passes import inline_functions, retype
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.random_weights import random_state_dict
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, run_graph
from tests.support.errors import refused


def test_inlined_functions_compute_the_same(exported: Path, tmp_path: Path) -> None:
    model = ir.load(exported / "model.onnx")
    inline_functions(model)
    assert not [node for node in model.graph if node.domain == "mmvision"]
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "layers.1.self_attn.VarlenAttention.attended_batch" in names
    # What depends on cu_seqlens alone is computed once, for the first layer.
    assert sum("same_image" in (name or "") for name in names) == 1
    ir.save(model, tmp_path / "inlined.onnx", external_data="inlined.data")
    pixels, grid = batch(GRIDS["three"], HEAD_DIM_80)
    np.testing.assert_allclose(
        run_graph(tmp_path / "inlined.onnx", pixels, grid),
        run_graph(exported / "model.onnx", pixels, grid),
        atol=2e-6,
    )


@pytest.mark.parametrize("opset", [18, 23])
def test_retyped_graph_is_the_graph_traced_in_float16(opset: int) -> None:
    """The float16 graph is the same by a pass and by tracing in float16."""

    def traced(dtype: torch.dtype) -> ir.Model:
        state = random_state_dict(HEAD_DIM_80, seed=1, dtype=dtype)
        return onnx_from_encoder(encoder_from_state_dict(HEAD_DIM_80, state), opset=opset)

    derived, half = traced(torch.float32), traced(torch.float16)
    retype(derived, ir.DataType.FLOAT16)
    assert [str(node) for node in derived.graph] == [str(node) for node in half.graph]
    assert list(derived.graph.initializers) == list(half.graph.initializers)
    for name, value in derived.graph.initializers.items():
        other = half.graph.initializers[name]
        assert value.const_value is not None
        assert other.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.const_value.numpy())


def test_retyping_leaves_copies_alone(encoder: VisionEncoderModule) -> None:
    model = onnx_from_encoder(encoder)
    derived = model.clone()
    retype(derived, ir.DataType.FLOAT16)
    assert {v.dtype for v in model.graph.inputs} == {ir.DataType.FLOAT, ir.DataType.INT64}
    assert {v.dtype for v in derived.graph.inputs} == {ir.DataType.FLOAT16, ir.DataType.INT64}


def test_retyping_refuses_what_overflows(encoder: VisionEncoderModule) -> None:
    state = dict(encoder.state_dict())
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    state[name] = state[name].clone()
    state[name][0, 0] = 1e6
    model = onnx_from_encoder(encoder_from_state_dict(HEAD_DIM_80, state))
    retype(model, ir.DataType.FLOAT16)
    value = model.graph.initializers["layers.1.mlp.fc1.weight"].const_value
    assert value is not None
    with refused(ExportError, "layers.1.mlp.fc1.weight", "float16", "1e+06") as caught:
        value.numpy()
    assert "--bf16" in str(caught.value.hint)
