"""`VarlenAttention` over slots of equal length, alone in a graph, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION, AttentionBody
from tests.support.configs import relative_l2
from tests.support.functions import (
    TYPES,
    random_qkv,
    session_of_function,
    with_expanded_mask,
)

SCALE = 80**-0.5
Case = tuple[AttentionBody, int, str]
UNIFORM: list[tuple[AttentionBody, int]] = [
    ("uniform_attention", 23),
    ("uniform_matmul", 18),
    ("uniform_matmul", 23),
]
EQUAL: list[tuple[AttentionBody, int]] = [
    ("equal_attention", 23),
    ("equal_matmul", 18),
    ("equal_matmul", 23),
]
SESSIONS = {
    (body, opset, dtype): session_of_function(
        with_expanded_mask(VARLEN_ATTENTION.function(body, opset)), dtype, SCALE
    )
    for body, opset in UNIFORM + EQUAL
    for dtype in TYPES
}
PACKED = {
    dtype: session_of_function(VARLEN_ATTENTION.function("matmul", 18), dtype, SCALE)
    for dtype in TYPES
}
UNIFORM_CASES = sorted(case for case in SESSIONS if case[:2] in UNIFORM)
EQUAL_CASES = sorted(case for case in SESSIONS if case[:2] in EQUAL)
every_uniform = pytest.mark.parametrize("case", UNIFORM_CASES, ids=str)


def exact(inputs: dict[str, Any], bounds: np.ndarray) -> np.ndarray:
    """Attention in float64."""
    return reference.varlen_attention(inputs["q"], inputs["k"], inputs["v"], bounds, scale=SCALE)


def bounds_of(images: list[int], slot: int) -> np.ndarray:
    """cu_seqlens of images, each with its padding behind it."""
    lengths = [length for image in images for length in (image, slot - image)]
    return np.cumsum([0, *lengths]).astype(np.int32)


def of_images(images: list[int], slot: int) -> np.ndarray:
    """Whether each patch is an image's."""
    return np.concatenate([np.arange(slot) < image for image in images])


def slots(max_slots: int = 5) -> st.SearchStrategy[tuple[list[int], int]]:
    """Images of a launch, and the length of its slots; some fill theirs, and some have one patch."""
    return st.integers(1, 40).flatmap(
        lambda slot: st.tuples(
            st.lists(st.integers(1, slot), min_size=1, max_size=max_slots), st.just(slot)
        )
    )


@settings(max_examples=40)
@given(case=st.sampled_from(UNIFORM_CASES), launch=slots())
def test_uniform(case: Case, launch: tuple[list[int], int]) -> None:
    images, slot = launch
    inputs = {
        **random_qkv(len(images) * slot, 2, 80, case[2]),
        "cu_seqlens": bounds_of(images, slot),
    }
    (out,) = SESSIONS[case].run(None, inputs)
    assert out.dtype == np.dtype(case[2])
    # The padding has results too, which are dropped.
    assert np.isfinite(out).all()
    kept = of_images(images, slot)
    expected = exact(inputs, inputs["cu_seqlens"])
    # The tolerance of the packed bodies, for which these rows are a batch as any other.
    tolerance = 4 * np.finfo(case[2]).eps
    assert relative_l2(out[kept], expected[kept]) <= tolerance
    (packed,) = PACKED[case[2]].run(None, inputs)
    assert relative_l2(packed[kept], expected[kept]) <= tolerance


@settings(max_examples=20)
@given(case=st.sampled_from(EQUAL_CASES), images=st.integers(1, 5), slot=st.integers(1, 40))
def test_equal(case: Case, images: int, slot: int) -> None:
    bounds = (np.arange(images + 1) * slot).astype(np.int32)
    inputs = random_qkv(images * slot, 2, 80, case[2])
    (out,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": bounds})
    expected = exact(inputs, bounds)
    assert relative_l2(out, expected) <= 4 * np.finfo(case[2]).eps


@pytest.mark.parametrize("wrong", [[11, 6], [9, 6], [16, 16]], ids=["late", "early", "no mask"])
@every_uniform
def test_a_wrong_key_mask_is_seen(case: Case, wrong: list[int]) -> None:
    """One patch of the padding seen, one of the image left out, or all of the padding seen."""
    inputs = random_qkv(32, 2, 80, case[2])
    right = [10, 6]
    (out,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": bounds_of(wrong, 16)})
    expected = exact(inputs, bounds_of(right, 16))
    kept = of_images(right, 16)
    assert relative_l2(out[kept], expected[kept]) > 100 * np.finfo(np.float16).eps


@pytest.mark.parametrize("case", [*UNIFORM_CASES, *EQUAL_CASES], ids=str)
def test_an_image_that_is_not_finite_stays_alone(case: Case) -> None:
    """In the packed bodies its values reach every image, since a weight of 0 times NaN is NaN."""
    images = [16, 16, 16] if case in EQUAL_CASES else [16, 9, 12]
    bounds = np.arange(4, dtype=np.int32) * 16
    if case not in EQUAL_CASES:
        bounds = bounds_of(images, 16)
    inputs = {**random_qkv(48, 2, 80, case[2]), "cu_seqlens": bounds}
    (before,) = SESSIONS[case].run(None, inputs)
    for name in "qkv":
        inputs[name] = inputs[name].copy()
        inputs[name][20] = np.nan
    (out,) = SESSIONS[case].run(None, inputs)
    (packed,) = PACKED[case[2]].run(None, inputs)
    others = of_images(images, 16) & (np.arange(48) // 16 != 1)
    np.testing.assert_array_equal(out[others], before[others])
    assert np.isnan(out[16 : 16 + images[1]]).all()
    assert np.isnan(packed[others]).all()


@pytest.mark.parametrize("case", [case for case in SESSIONS if case[2] == "float16"], ids=str)
def test_large_scores_stay_finite_in_float16(case: Case) -> None:
    """Scores before scaling beyond float16's maximum of 65504, as outlier channels give."""
    bounds = np.array([0, 16, 32], np.int32)
    if case in UNIFORM_CASES:
        bounds = bounds_of([16, 9], 16)
    inputs = random_qkv(32, 2, 80, "float16")
    inputs["q"], inputs["k"] = inputs["q"] * np.float16(40), inputs["k"] * np.float16(40)
    (out,) = SESSIONS[case].run(None, {**inputs, "cu_seqlens": bounds})
    expected = exact(inputs, bounds)
    kept = of_images([16, 9 if case in UNIFORM_CASES else 16], 16)
    assert np.isfinite(out).all()
    assert relative_l2(out[kept], expected[kept]) < 0.05
