"""Each fault planted in one place is caught, and that place is the one that is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.jump import StageDistance
from mmvision_export.parity.layers import GraphStages
from mmvision_export.parity.report.page import record_from_parity
from mmvision_export.parity.result import ParityResult, record_parity
from mmvision_export.parity.samples import samples_from_grids
from tests.support.checkpoints import FC1, LAYOUTS, STATE, write_checkpoint
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.faults import (
    gather,
    interleave_rotary_pairs,
    leak_between_images,
    node_of,
    rewrite,
    scale_weights,
    swap_rotation,
)

DEEP = dataclasses.replace(HEAD_DIM_80, num_hidden_layers=12)
SAMPLES = samples_from_grids(HEAD_DIM_80, {"two sizes": ((1, 3, 4), (2, 2, 2))})


def one_segment_in_layer_1(model: ir.Model) -> None:
    """Layer 1 is told that all patches are one image.

    An empty segment follows it, which the uniform flavour takes for its padding.
    """
    attention = node_of(model, "layers.1.self_attn.VarlenAttention")
    ends = ir.Value(
        name="ends", const_value=ir.tensor(np.array([0, -1, -1], dtype=np.int64), name="ends")
    )
    model.graph.initializers.add(ends)
    whole = ir.node("Gather", [attention.inputs[3], ends], attributes={"axis": 0}, name="whole")
    whole.outputs[0].name = "whole"
    model.graph.insert_before(attention, whole)
    attention.replace_input_with(3, whole.outputs[0])


def same_order(model: ir.Model) -> None:
    """The control of the rotary fault: the same nodes, which change nothing."""
    gather(
        model,
        node_of(model, "layers.1.self_attn.QKRotaryEmbedding"),
        np.arange(HEAD_DIM_80.head_dim),
    )


def checked(directory: Path) -> ParityResult:
    result = check_parity(directory, samples=SAMPLES)
    record_parity(result)
    return result


def stages_before(graph: GraphStages, stage: str) -> list[StageDistance]:
    """What is computed before a stage; names do not tell, `layers.10` sorts before `layers.2`."""
    order = [row.stage for row in graph.stages]
    return graph.stages[: order.index(stage)]


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (scale_weights, "layers.1"),
        (interleave_rotary_pairs, "layers.1"),
        (swap_rotation, "layers.0"),
        (one_segment_in_layer_1, "layers.1"),
        (leak_between_images, "layers.0"),
    ],
)
def test_the_layer_of_a_fault_is_named(
    fault: Callable[[ir.Model], None], stage: str, exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, fault)
    result = checked(directory)
    assert not result.passed
    graph = result.layers.graphs["model.onnx"]
    assert graph.jump is not None
    assert graph.jump.stage == stage
    assert Manifest.read(directory).parity["model.onnx"]["layers"]["first_jump"]["stage"] == stage
    assert record_from_parity(result)["layers"]["graphs"]["model.onnx"]["jump"]["stage"] == stage
    before = stages_before(graph, stage)
    assert before
    assert all(row.distance.relative_l2 < 1e-6 for row in before)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, so that names of stages do not sort as the stages do."""
    directory = tmp_path_factory.mktemp("deep") / "m"
    export_model_directory(WeightSource(random_config=DEEP, seed=1), directory)
    return directory


@pytest.mark.parametrize("layer", [2, 10])
def test_the_layer_of_a_fault_is_named_among_more_than_ten(
    layer: int, deep: Path, tmp_path: Path
) -> None:
    directory = copy_of(deep, tmp_path / "m")
    rewrite(directory, partial(scale_weights, layer=layer))
    graph = check_parity(directory, samples=SAMPLES).layers.graphs["model.onnx"]
    assert graph.jump is not None
    assert graph.jump.stage == f"layers.{layer}"
    before = stages_before(graph, f"layers.{layer}")
    assert len(before) == 2 + layer  # the embedding, its norm, and the layers
    assert all(row.distance.relative_l2 < 1e-6 for row in before)
    # The control: from the fault on, nothing is as it should be.
    after = graph.stages[len(before) :]
    assert len(after) == DEEP.num_hidden_layers - layer + 2
    assert all(row.distance.relative_l2 > 1e-6 for row in after)


@pytest.mark.parametrize("change", [lambda _: None, same_order])
def test_without_a_fault_no_layer_is_named(
    change: Callable[[ir.Model], None], exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, change)
    result = checked(directory)
    assert result.passed
    assert result.layers.graphs["model.onnx"].jump is None


@pytest.mark.parametrize("fault", [interleave_rotary_pairs, one_segment_in_layer_1])
def test_a_fault_stands_out_from_float16s_own_error(
    fault: Callable[[ir.Model], None], exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, fault)
    derive_fp16(directory, Manifest.read(directory), check=False)
    jump = checked(directory).layers.graphs["model.fp16.onnx"].jump
    assert jump is not None
    assert jump.stage == "layers.1"


def test_a_float16_overflow_is_seen_and_named(tmp_path: Path) -> None:
    """fc1 of layer 1 gives values that float16 cannot hold, and fc2 would take them back.

    float32 and bfloat16 are not bothered. ONNX Runtime on a CPU is not either, with a float16
    graph: it keeps the values in float32. A GPU does not, and nor does rounding.
    """
    state = dict(STATE)
    bias = FC1.replace("weight", "bias")
    state[FC1], state[bias] = state[FC1] * 2.0**15, state[bias] * 2.0**15
    fc2 = FC1.replace("fc1", "fc2")
    state[fc2] = state[fc2] * 2.0**-15
    source = WeightSource(
        checkpoint=str(write_checkpoint(tmp_path / "c", LAYOUTS["released"](state)))
    )
    export_model_directory(source, tmp_path / "fp16", precision="fp16")
    result = checked(tmp_path / "fp16")
    assert not result.passed
    rows = {row.runner: row.metrics for row in result.rows}
    assert rows["model.onnx"].non_finite == 0
    assert rows["model.onnx (rounded)"].non_finite > 0
    jump = result.layers.graphs["model.onnx"].jump
    assert jump is not None
    assert jump.stage == "layers.1"
    assert "PyTorch's are not either: this type lacks the range" in jump.reason
    assert any(
        "beyond float16's largest value" in w and "layers.1.mlp.fc1" in w for w in result.warnings
    )
    assert "NaN" not in (tmp_path / "fp16" / "manifest.json").read_text()

    export_model_directory(source, tmp_path / "bf16", precision="bf16")
    assert checked(tmp_path / "bf16").passed
