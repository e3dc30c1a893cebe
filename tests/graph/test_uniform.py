"""The uniform flavour and the bodies for slots in the whole graph: structure and numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.artifacts.manifest import UNIFORM_GRAPH, Manifest
from mmvision_export.core.errors import ExportError, InputError
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.graph.passes import retype
from mmvision_export.graph.uniform import uniform_graph_from_portable
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.slots import slot_rows, slots_from_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION, AttentionBody
from tests.support.configs import (
    GRIDS,
    HEAD_DIM_64,
    HEAD_DIM_80,
    arrays,
    batch,
    grids,
    relative_l2,
    run_graph,
)
from tests.support.errors import refused
from tests.support.functions import with_expanded_mask
from tests.support.lowered import session_of

UNIFORM: tuple[AttentionBody, ...] = ("uniform_attention", "uniform_matmul")
EQUAL: tuple[AttentionBody, ...] = ("equal_attention", "equal_matmul")
FLAVOUR = "the flavour"


def with_body(
    path: Path,
    body: AttentionBody,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    change: Callable[[onnx.FunctionProto], None] = lambda _: None,
) -> onnxruntime.InferenceSession:
    """The portable graph with another body of `VarlenAttention`, in ONNX Runtime."""
    model = ir.load(path / "model.onnx")
    if dtype != ir.DataType.FLOAT:
        retype(model, dtype)
    function = VARLEN_ATTENTION.function(body, model.opset_imports[""])
    change(function)
    if body in UNIFORM + EQUAL:
        function = with_expanded_mask(function)
    changed = ir.serde.deserialize_function(function)
    model.functions[changed.identifier()] = changed
    return session_of(model, path)


def run(session: onnxruntime.InferenceSession, pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    (out,) = session.run(None, {"pixel_values": pixels, "grid_thw": rows})
    result: np.ndarray = out
    return result


@pytest.fixture(scope="module")
def sessions(exported: Path) -> dict[str, onnxruntime.InferenceSession]:
    """Each body in the whole graph, the flavour, and the portable graph as it is."""
    bodies: tuple[AttentionBody, ...] = (*UNIFORM, *EQUAL, "attention")
    found: dict[str, onnxruntime.InferenceSession] = {
        body: with_body(exported, body) for body in bodies
    }
    found[FLAVOUR] = session_of(ir.load(exported / UNIFORM_GRAPH), exported)
    return found


@pytest.fixture(scope="module")
def float64_state(encoder: VisionEncoderModule) -> dict[str, Any]:
    return arrays({name: tensor.double() for name, tensor in encoder.state_dict().items()})


@settings(max_examples=12)
@given(body=st.sampled_from([*UNIFORM, FLAVOUR]), grid=grids(max_images=4), spare=st.integers(0, 3))
def test_uniform_is_the_packed_graph_and_the_reference(
    sessions: dict[str, onnxruntime.InferenceSession],
    float64_state: dict[str, Any],
    body: str,
    grid: list[tuple[int, int, int]],
    spare: int,
) -> None:
    """On the very same rows: the largest image fills its slot, or leaves some blocks of it."""
    pixels, rows = batch(grid, HEAD_DIM_80)
    slot = int(rows.prod(axis=1).max()) + 4 * spare
    slots = slots_from_batch(pixels, rows, HEAD_DIM_80, slot_patches=slot)
    out = slots.packed(run(sessions[body], slots.pixel_values, slots.grid_thw))
    packed = slots.packed(run(sessions["attention"], slots.pixel_values, slots.grid_thw))
    expected = reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80)
    assert out.shape == expected.shape
    assert relative_l2(out, expected) <= 1e-5
    assert relative_l2(out, packed) <= 1e-5


@settings(max_examples=6)
@given(
    body=st.sampled_from(EQUAL),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    turned=st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_equal_is_the_packed_graph_and_the_reference(
    sessions: dict[str, onnxruntime.InferenceSession],
    float64_state: dict[str, Any],
    body: str,
    sides: tuple[int, int],
    turned: list[bool],
) -> None:
    """Images of as many patches, upright and lying."""
    h, w = (2 * side for side in sides)
    pixels, rows = batch([(1, w, h) if turn else (1, h, w) for turn in turned], HEAD_DIM_80)
    out = run(sessions[body], pixels, rows)
    expected = reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80)
    assert relative_l2(out, expected) <= 1e-5
    assert relative_l2(out, run(sessions["attention"], pixels, rows)) <= 1e-5


def sees_one_key_more(function: onnx.FunctionProto) -> None:
    last = next(node for node in function.node if node.output[0] == "image_last")
    last.input[1] = "zero"


def sees_one_key_less(function: onnx.FunctionProto) -> None:
    step = next(node for node in function.node if node.output[0] == "image_patches")
    last = next(node for node in function.node if node.output[0] == "image_last")
    nodes = list(function.node)
    fewer = onnx.helper.make_node("Sub", [step.output[0], "one"], ["one_fewer"], "one_fewer")
    nodes.insert(nodes.index(last), fewer)
    last.input[0] = "one_fewer"
    del function.node[:]
    function.node.extend(nodes)


def sees_every_key(function: onnx.FunctionProto) -> None:
    mask = next(node for node in function.node if node.output[0] == "of_image")
    mask.input[0] = "index"  # which is at least itself


@pytest.mark.parametrize("change", [sees_one_key_more, sees_one_key_less, sees_every_key])
@pytest.mark.parametrize("body", UNIFORM)
def test_a_wrong_key_mask_is_seen(
    exported: Path,
    sessions: dict[str, onnxruntime.InferenceSession],
    body: AttentionBody,
    change: Callable[[onnx.FunctionProto], None],
) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    slots = slots_from_batch(pixels, rows, HEAD_DIM_80, slot_patches=40)
    right, wrong = (
        slots.packed(run(session, slots.pixel_values, slots.grid_thw))
        for session in (sessions[body], with_body(exported, body, change=change))
    )
    assert relative_l2(wrong, right) > 1e-4


@pytest.mark.parametrize("body", [*UNIFORM, *EQUAL])
def test_an_image_that_overflows_in_float16_leaves_the_others(
    exported: Path, body: AttentionBody
) -> None:
    """The control: a masked product takes it to every image, since a weight of 0 times NaN is NaN."""
    pixels, rows = batch([(1, 4, 6)] * 3, HEAD_DIM_80)
    if body in UNIFORM:
        pixels, rows = batch([(1, 4, 6), (1, 2, 6), (1, 4, 4)], HEAD_DIM_80)
    slots = slots_from_batch(pixels.astype(np.float16), rows, HEAD_DIM_80)
    grid = rows if body in EQUAL else slots.grid_thw
    session = with_body(exported, body, dtype=ir.DataType.FLOAT16)
    masked = with_body(exported, "attention", dtype=ir.DataType.FLOAT16)
    before = slots.packed(run(session, slots.pixel_values, grid))
    assert np.isfinite(before).all()
    slots.pixel_values[24:28] = 6e4
    after, leaked = (
        slots.packed(run(each, slots.pixel_values, grid)) for each in (session, masked)
    )
    second = np.zeros(len(after), bool)
    second[6 : 6 + int(rows[1].prod()) // 4] = True
    np.testing.assert_array_equal(after[~second], before[~second])
    assert not np.isfinite(after[second]).any()
    assert not np.isfinite(leaked[~second]).any()


def test_structure(exported: Path) -> None:
    portable, model = (
        onnx.load(exported / name, load_external_data=False)
        for name in ("model.onnx", UNIFORM_GRAPH)
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
    assert UNIFORM_GRAPH in Manifest.read(exported).files


def test_the_layers_share_their_mask_and_their_slots(exported: Path) -> None:
    names = [node.name for node in ir.load(exported / UNIFORM_GRAPH).graph]
    for shared in ("of_image", "slot_patches", "num_slots", "index"):
        assert sum(str(name).endswith(f".{shared}") for name in names) == 1, shared


def test_float16_has_none(tmp_path: Path) -> None:
    source = WeightSource(random_config=HEAD_DIM_64, seed=1)
    export_model_directory(source, tmp_path / "m", precision="fp16")
    assert not (tmp_path / "m" / UNIFORM_GRAPH).exists()
    with refused(ExportError, "float16"):
        uniform_graph_from_portable(tmp_path / "m" / "model.onnx")


def test_an_operator_without_definition_is_refused(exported: Path, tmp_path: Path) -> None:
    model = ir.load(exported / "model.onnx")
    del model.functions["mmvision", "QKRotaryEmbedding", ""]
    path = tmp_path / "model.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    with refused(ExportError, "QKRotaryEmbedding"):
        uniform_graph_from_portable(path)


def test_rows_of_slots() -> None:
    rows = slot_rows(np.array([(1, 4, 6), (2, 2, 4)]), 24, HEAD_DIM_80)
    assert rows.tolist() == [[1, 4, 6], [0, 2, 2], [2, 2, 4], [1, 2, 4]]
    assert rows.prod(axis=1).reshape(-1, 2).sum(axis=1).tolist() == [24, 24]
    for slot, facts in ((20, (20, 24)), (26, (26,))):
        with refused(InputError, 4, *facts):
            slot_rows(np.array([(1, 4, 6)]), slot, HEAD_DIM_80)


def test_what_is_laid_out_comes_back(exported: Path) -> None:
    pixels, rows = batch(GRIDS["many"], HEAD_DIM_80)
    slots = slots_from_batch(pixels, rows, HEAD_DIM_80, slot_patches=20)
    np.testing.assert_array_equal(slots.packed(slots.pixel_values), pixels)
    tokens = slots.pixel_values[::4]
    np.testing.assert_array_equal(slots.packed(tokens), pixels[::4])
    # The comparison can fail: whoever reads the tokens as they come gets padding.
    out = run_graph(exported / UNIFORM_GRAPH, slots.pixel_values, slots.grid_thw)
    portable = run_graph(exported / "model.onnx", pixels, rows)
    assert relative_l2(slots.packed(out), portable) <= 2e-6
    assert relative_l2(out[: len(portable)], portable) > 1e-2
