"""The CPU flavour: its structure, and its numbers against float64 and the portable graph."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import ExportError
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.graph.cpu.flavour import cpu_graph_from_portable
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.weights import WeightSource
from tests.support.checkpoints import STATE, write_checkpoint
from tests.support.configs import (
    GRIDS,
    HEAD_DIM_48,
    HEAD_DIM_64,
    HEAD_DIM_80,
    arrays,
    batch,
    grids,
    relative_l2,
    run_graph,
)
from tests.support.errors import refused

# What the portable graph is held to (test_onnx_export.py): float32's rounding over two layers
# measures 3e-7.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def float64_state() -> dict[str, np.ndarray]:
    return arrays(random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def small_blocks(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph in blocks of 20 patches, so that small batches have several, and padding."""
    path = tmp_path_factory.mktemp("blocks") / "model.cpu.onnx"
    model = cpu_graph_from_portable(exported / "model.onnx", HEAD_DIM_80, block_patches=20)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    shutil.copyfile(exported / "model.onnx.data", path.parent / "model.onnx.data")
    return path


@settings(max_examples=25)
@given(grid=grids())
def test_any_grid_against_float64(
    small_blocks: Path,
    exported: Path,
    float64_state: dict[str, np.ndarray],
    grid: list[tuple[int, int, int]],
) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80)
    out = run_graph(small_blocks, pixels, rows)
    assert (
        relative_l2(out, reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80))
        <= TOLERANCE
    )
    assert relative_l2(out, run_graph(exported / "model.onnx", pixels, rows)) <= 2 * TOLERANCE


@pytest.mark.parametrize("patches", [4, 1020, 1024, 1028, 2052])
def test_around_the_ends_of_blocks(exported: Path, patches: int) -> None:
    pixels, rows = batch([(1, 2, patches // 2)], HEAD_DIM_80)
    expected = run_graph(exported / "model.onnx", pixels, rows)
    assert (
        relative_l2(run_graph(exported / "model.cpu.onnx", pixels, rows), expected) <= 2 * TOLERANCE
    )


@pytest.mark.parametrize(
    ("config", "opset"),
    [
        (HEAD_DIM_64, 18),
        (HEAD_DIM_48, 23),
        (
            dataclasses.replace(
                HEAD_DIM_80, projector_bias=False, merger_bias=False, spatial_merge_size=3
            ),
            20,
        ),
    ],
    ids=["60 of 64 channels rotate", "all channels rotate", "no biases, merge 3"],
)
def test_other_dimensions(config: EncoderConfig, opset: int, tmp_path: Path) -> None:
    export_model_directory(WeightSource(random_config=config, seed=1), tmp_path / "m", opset=opset)
    side = 2 * config.spatial_merge_size
    pixels, rows = batch([(1, side, side), (2, side, 2 * side)], config)
    state = arrays(random_state_dict(config, seed=1, dtype=torch.float64))
    expected = reference.vision_encoder(state, pixels, rows, config)
    assert (
        relative_l2(run_graph(tmp_path / "m" / "model.cpu.onnx", pixels, rows), expected)
        <= TOLERANCE
    )


def test_the_comparison_can_fail(exported: Path, float64_state: dict[str, np.ndarray]) -> None:
    """Attention across the boundary of two images, and the rotation of another grid, are seen."""
    pixels, rows = batch(GRIDS["two of different size"], HEAD_DIM_80)
    expected = reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80)
    for wrong in ([[1, 10, 4]], [[1, 8, 2], [1, 4, 6]]):
        out = run_graph(exported / "model.cpu.onnx", pixels, np.array(wrong))
        assert relative_l2(out, expected) > 1e-3


def test_structure(exported: Path) -> None:
    portable, model = (
        onnx.load(exported / name, load_external_data=False)
        for name in ("model.onnx", "model.cpu.onnx")
    )
    assert model.graph.input == portable.graph.input
    assert model.graph.output == portable.graph.output
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("VarlenAttention") == HEAD_DIM_80.num_hidden_layers
    assert operators.count("Scan") == HEAD_DIM_80.num_hidden_layers + 1
    assert not {"Attention", "Softmax", "Erf", "Where"} & set(operators)
    # Our operators carry their definition.
    assert {(function.domain, function.name) for function in model.functions} == {
        ("mmvision", "Linear"),
        ("mmvision", "LinearGelu"),
        ("mmvision", "VarlenAttention"),
    }
    # Every weight is the portable graph's own, read from the same place of the same file.
    theirs = {tensor.name: tensor for tensor in portable.graph.initializer}
    assert all(theirs[tensor.name] == tensor for tensor in model.graph.initializer)
    assert sum(name.endswith("weight") for name in theirs) == sum(
        tensor.name.endswith("weight") for tensor in model.graph.initializer
    )


def test_the_cpu_runtime_picks_it_and_says_so(exported: Path) -> None:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        assert encoder.info["graph"] == "model.cpu.onnx"
    assert "model.cpu.onnx" in Manifest.read(exported).files


def test_only_float32_has_one(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="fp16"
    )
    assert not (tmp_path / "m" / "model.cpu.onnx").exists()
    with VisionEncoder.open(tmp_path / "m", backend="onnxruntime-cpu") as encoder:
        assert encoder.info["graph"] == "model.onnx"
    with pytest.raises(ExportError) as refused:
        cpu_graph_from_portable(tmp_path / "m" / "model.onnx", HEAD_DIM_80)
    assert all(fact in str(refused.value) for fact in ("model.onnx", "float32", "float16"))


def test_equal_tensors_of_different_modules(tmp_path: Path) -> None:
    """Of a freshly initialised checkpoint, all layer norms' weights are ones, each under its name."""
    state = {
        name: torch.full_like(tensor, float(name.endswith("weight"))) if "norm" in name else tensor
        for name, tensor in STATE.items()
    }
    checkpoint = write_checkpoint(tmp_path / "checkpoint", state)
    directory = tmp_path / "m"
    export_model_directory(WeightSource(checkpoint=str(checkpoint)), directory)
    initializers = ir.load(directory / "model.onnx").graph.initializers
    assert {f"layers.{i}.layer_norm{j}.weight" for i in (0, 1) for j in (1, 2)} <= set(initializers)

    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    out = run_graph(directory / "model.cpu.onnx", pixels, rows)
    float64 = arrays({name: tensor.double() for name, tensor in state.items()})
    expected = reference.vision_encoder(float64, pixels, rows, HEAD_DIM_80)
    assert relative_l2(out, expected) <= TOLERANCE
    # The control: another layer's norm would be seen.
    float64["vision_tower.vision_model.encoder.layers.1.layer_norm1.weight"] *= 1.1
    wrong = reference.vision_encoder(float64, pixels, rows, HEAD_DIM_80)
    assert relative_l2(out, wrong) > 1e-3


@pytest.mark.parametrize("module", ["layers.1.layer_norm1", "patch_merge_mlp.linear_2"])
def test_a_module_without_a_node_is_named(exported: Path, module: str, tmp_path: Path) -> None:
    model = ir.load(exported / "model.onnx")
    next(node for node in model.graph if node.name == module).name = "unknown"
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(ExportError) as refused:
        cpu_graph_from_portable(tmp_path / "model.onnx", HEAD_DIM_80)
    assert module in str(refused.value)


def test_nodes_have_the_names_of_their_outputs(exported: Path) -> None:
    """Which a profiler's table shows."""
    model = ir.load(exported / "model.cpu.onnx")
    scans = [node for node in model.graph if node.op_type == "Scan"]
    assert [scan.name for scan in scans] == [
        "blocks.0.x_blocks",
        "blocks.1.x_blocks",
        "tokens_blocks",
    ]
    for scan, index in zip(scans, range(3), strict=True):
        for node in scan.attributes["body"].as_graph():
            assert node.name == node.outputs[0].name
            assert (node.name or "").startswith(f"blocks.{index}.")
    attention = [node.name for node in model.graph if node.op_type == "VarlenAttention"]
    assert attention == ["layers.0.attention.attended", "layers.1.attention.attended"]


def test_a_graph_of_something_else_is_refused(tmp_path: Path) -> None:
    other = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    onnx.save(other, tmp_path / "other.onnx")
    with refused(
        ExportError, tmp_path / "other.onnx", "VarlenAttention", "QKRotaryEmbedding", "none"
    ):
        cpu_graph_from_portable(tmp_path / "other.onnx", HEAD_DIM_80)
