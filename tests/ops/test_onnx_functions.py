"""Each op's ONNX definition, alone in a graph, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.core.errors import ExportError
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.ops.definition import OpDefinition
from mmvision_export.ops.qk_rotary_embedding.onnx_op import QK_ROTARY_EMBEDDING
from mmvision_export.ops.registry import OPS
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION, AttentionBody
from tests.support.configs import relative_l2
from tests.support.functions import TYPES, random_qkv, session_of_function

SEGMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def named(value: OpDefinition | str) -> str:
    return value if isinstance(value, str) else value.name


Case = tuple[AttentionBody, int, str]
BODIES: list[tuple[AttentionBody, int]] = [("attention", 23), ("matmul", 18), ("matmul", 23)]
SESSIONS = {
    (body, opset, dtype): session_of_function(
        VARLEN_ATTENTION.function(body, opset), dtype, 80**-0.5
    )
    for body, opset in BODIES
    for dtype in TYPES
}


@settings(max_examples=40)
@given(case=st.sampled_from(sorted(SESSIONS)), lengths=SEGMENTS)
def test_attention(case: Case, lengths: list[int]) -> None:
    inputs = random_qkv(sum(lengths), 2, 80, case[2])
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    (out,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": bounds})
    expected = reference.varlen_attention(
        inputs["q"], inputs["k"], inputs["v"], bounds, scale=80**-0.5
    )
    assert out.dtype == np.dtype(case[2])
    # Two products and a softmax, each rounded to the dtype: a few roundings of the result.
    assert relative_l2(out, expected) <= 4 * np.finfo(case[2]).eps


@pytest.mark.parametrize("case", sorted(SESSIONS), ids=str)
def test_a_leak_between_images_is_seen(case: Case) -> None:
    inputs = random_qkv(24, 2, 80, case[2])
    (whole,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": np.array([0, 24], np.int32)})
    expected = reference.varlen_attention(
        inputs["q"], inputs["k"], inputs["v"], [0, 10, 24], scale=80**-0.5
    )
    assert relative_l2(whole, expected) > 0.1


@pytest.mark.parametrize(
    "case", [case for case in sorted(SESSIONS) if case[2] == "float16"], ids=str
)
def test_attention_of_large_scores_stays_finite_in_float16(case: Case) -> None:
    """Scores before scaling beyond float16's maximum of 65504, as outlier channels give."""
    inputs = random_qkv(16, 2, 80, "float16")
    inputs["q"], inputs["k"] = inputs["q"] * np.float16(40), inputs["k"] * np.float16(40)
    bounds = np.array([0, 6, 16], np.int32)
    (out,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": bounds})
    expected = reference.varlen_attention(
        inputs["q"], inputs["k"], inputs["v"], bounds, scale=80**-0.5
    )
    assert np.isfinite(out).all()
    assert relative_l2(out, expected) < 0.05


@settings(max_examples=30)
@given(
    n=st.integers(1, 50),
    half=st.integers(1, 40),
    dtype=st.sampled_from(sorted(TYPES)),
    opset=st.sampled_from([18, 23]),
)
def test_rotation(n: int, half: int, dtype: str, opset: int) -> None:
    """From one rotated pair to all 80 channels, with nothing left to pass through."""
    inputs = random_qkv(n, 3, 80, dtype)
    angles = np.random.default_rng(half).standard_normal((n, half)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    runner = session_of_function(QK_ROTARY_EMBEDDING.function("standard", opset), dtype)
    out = runner.run(None, {"q": inputs["q"], "k": inputs["k"], "cos": cos, "sin": sin})
    expected = reference.qk_rotary_embedding(inputs["q"], inputs["k"], cos, sin)
    for got, wanted in zip(out, expected, strict=True):
        assert got.dtype == np.dtype(dtype)
        assert relative_l2(got, wanted) <= np.finfo(dtype).eps


@pytest.mark.parametrize(
    ("op", "body"), [(op, body) for op in OPS.values() for body in op.bodies], ids=named
)
def test_definitions_can_be_looked_up_by_a_plugin_registry(op: OpDefinition, body: str) -> None:
    function = op.function(body, 23)
    defaults = {attribute.name: attribute.s for attribute in function.attribute_proto}
    assert defaults == {"plugin_namespace": b"mmvision", "plugin_version": b"1"}
    names = [node.name for node in function.node]
    assert len(set(names)) == len(names)
    assert all(names)


def test_bodies_refuse_an_opset_that_is_too_low() -> None:
    with pytest.raises(ExportError) as caught:
        VARLEN_ATTENTION.function("attention", 22)
    assert all(fact in str(caught.value) for fact in ("VarlenAttention", "'attention'", "23", "22"))
    assert "'matmul'" in str(caught.value.hint)
    with pytest.raises(ExportError) as caught:
        VARLEN_ATTENTION.function("matmul", 17)
    assert all(fact in str(caught.value) for fact in ("'matmul'", "18", "17"))
    assert caught.value.hint is None
    # What stands for a body must take the same operands.
    with pytest.raises(ExportError) as caught:
        VARLEN_ATTENTION.function("uniform_attention", 22)
    assert "'uniform_matmul'" in str(caught.value.hint)


def test_an_unknown_body_is_refused_with_those_there_are() -> None:
    with pytest.raises(ExportError) as caught:
        VARLEN_ATTENTION.function("flash", 23)
    assert "'flash'" in str(caught.value)
    assert all(body in str(caught.value.hint) for body in VARLEN_ATTENTION.bodies)


@pytest.mark.parametrize(("opset", "body"), [(18, "matmul"), (22, "matmul"), (23, "attention")])
def test_the_best_portable_body_of_an_opset(opset: int, body: AttentionBody) -> None:
    assert VARLEN_ATTENTION.portable_body(opset) == body
    with pytest.raises(ExportError, match="18"):
        VARLEN_ATTENTION.portable_body(17)
