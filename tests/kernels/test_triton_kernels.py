"""The Triton kernels, run by Triton's interpreter, against the float64 reference.

The interpreter runs each program as NumPy, so that indices, masks and arithmetic are the kernel's; what it cannot show
is timing, and what a GPU does that NumPy does not. On a GPU none of this has run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.kernels.compile import kernel_module
from mmvision_export.models.minimax_m3_vl import reference
from tests.support.attention import attention_by_kernel as attention
from tests.support.attention import cu, eager_attention_error, qkv
from tests.support.configs import relative_l2

pytest.importorskip("triton", reason="triton is not installed")

ATTENTION, ROTARY = kernel_module("varlen_attention"), kernel_module("qk_rotary_embedding")
HEAD_DIMS = list(range(16, 129, 16))
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products() -> Any:
    """Triton 3.9's interpreter keeps bfloat16 as its bits, and multiplies the bits. A product in float32 is a GPU's."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *more)

    patch = pytest.MonkeyPatch()
    patch.setattr(InterpreterBuilder, "create_dot", dot)
    yield
    patch.undo()


def check(lengths: list[int], head_dim: int, dtype: str, heads: int = 2, **blocks: int) -> None:
    q, k, v = qkv(sum(lengths), heads, head_dim, TYPES[dtype])
    bounds, scale = cu(lengths), head_dim**-0.5
    out = attention(q, k, v, bounds, **blocks)
    assert torch.isfinite(out).all()  # every element written
    expected = reference.varlen_attention(
        q.double(), k.double(), v.double(), bounds.numpy(), scale=scale
    )
    limit = max(2 * eager_attention_error(q, k, v, bounds, scale), torch.finfo(q.dtype).eps)
    assert relative_l2(out.double(), expected) <= limit


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=7).filter(any),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(sorted(TYPES)),
    blocks=st.sampled_from([(64, 32), (32, 64), (16, 16)]),
)
def test_random_segments(
    lengths: list[int], head_dim: int, dtype: str, blocks: tuple[int, int]
) -> None:
    check(lengths, head_dim, dtype, block_m=blocks[0], block_n=blocks[1])


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize(
    "lengths",
    [
        [4],
        [1],
        [0, 1, 0],
        [63],
        [64],
        [65],
        [31, 33],
        [127, 1, 129],
        [4] * 40,
        [64] * 3,
        [2, 301, 2],
        [97, 101, 103],
    ],
    ids=str,
)
def test_sizes_that_hurt(lengths: list[int], dtype: str) -> None:
    check(lengths, 80, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths", [[4] * 1024, [2304, 4, 4092], [4096, 12]], ids=["1024 x 4", "mixed", "large"]
)
def test_large(lengths: list[int]) -> None:
    check(lengths, 80, "float16", heads=1, block_m=128, block_n=128)


def test_garbage_around_the_segments_is_neither_read_nor_written() -> None:
    """NaN in front of, and behind, what cu_seqlens covers."""
    q, k, v = (
        torch.cat([x, torch.full((9, 2, 80), math.nan).half()])
        for x in qkv(70, 2, 80, torch.float16)
    )
    out = attention(q, k, v, cu([33, 37]))
    assert torch.isfinite(out[:70]).all()
    assert torch.isnan(out[70:]).all()
    expected = attention(
        q[:70].contiguous(), k[:70].contiguous(), v[:70].contiguous(), cu([33, 37])
    )
    assert torch.equal(out[:70], expected)


def test_a_leak_between_segments_is_seen() -> None:
    q, k, v = qkv(70, 2, 80, torch.float16)
    expected = reference.varlen_attention(
        q.double(), k.double(), v.double(), [0, 33, 70], scale=80**-0.5
    )
    assert relative_l2(attention(q, k, v, cu([70])).double(), expected) > 0.1


def test_large_scores_stay_finite() -> None:
    q, k, v = qkv(40, 1, 80, torch.float16)
    out = attention(q * 60, k * 60, v, cu([40]))
    expected = reference.varlen_attention(
        (q * 60).double(), (k * 60).double(), v.double(), [0, 40], scale=80**-0.5
    )
    assert torch.isfinite(out).all()
    assert relative_l2(out.double(), expected) < 0.01


@given(
    lengths=st.lists(st.integers(1, 70000), min_size=1, max_size=1024),
    block_m=st.sampled_from([64, 128]),
)
@settings(max_examples=50)
def test_every_tile_has_a_program(lengths: list[int], block_m: int) -> None:
    """The grid that the host computes without reading a length covers every tile of every segment."""
    bounds = np.cumsum([0, *lengths])
    first = bounds[:-1] // block_m + np.arange(len(lengths))
    last = np.append(first[1:], ATTENTION.num_programs(int(bounds[-1]), len(lengths), block_m))
    tiles = -(-np.array(lengths) // block_m)
    assert (last - first >= tiles).all()


@pytest.mark.parametrize("head_dim", [0, 8, 72, 144, -16])
def test_head_dims_without_a_split(head_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"\b16\b.*\b128\b.*{head_dim}\b"):
        ATTENTION.head_parts(head_dim)


def test_head_parts_waste_nothing() -> None:
    for head_dim in HEAD_DIMS:
        parts = ATTENTION.head_parts(head_dim)
        assert sum(parts) == head_dim
        assert all(part == 0 or part & (part - 1) == 0 for part in parts)
    assert ATTENTION.head_parts(80) == (64, 16, 0)


@settings(max_examples=40)
@given(
    n=st.integers(1, 50),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(sorted(TYPES)),
    share=st.floats(0.01, 1.0),
)
def test_rotation(n: int, head_dim: int, dtype: str, share: float) -> None:
    q, k, _ = qkv(n, 3, head_dim, TYPES[dtype])
    half = max(1, int(share * head_dim / 2))
    angles = torch.randn(n, half, generator=torch.Generator().manual_seed(1))
    outs = [torch.full_like(q, math.nan) for _ in range(2)]
    grid = (-(-n // ROTARY.BLOCK_N), 3, 2)
    ROTARY.qk_rotary_embedding_kernel[grid](
        q,
        k,
        angles.cos(),
        angles.sin(),
        *outs,
        n,
        3,
        head_dim,
        half,
        ROTARY.HEAD_BLOCK,
        ROTARY.BLOCK_N,
    )
    expected = reference.qk_rotary_embedding(
        q.double(), k.double(), angles.cos().double(), angles.sin().double()
    )
    for got, wanted, source in zip(outs, expected, (q, k), strict=True):
        assert relative_l2(got.double(), wanted) <= torch.finfo(q.dtype).eps
        assert torch.equal(got[..., 2 * half :], source[..., 2 * half :])
        # The control: it does rotate, which few channels of many would hardly show in the whole.
        before, after = source[..., : 2 * half].double(), wanted[..., : 2 * half]
        assert relative_l2(before, after) > 10 * torch.finfo(q.dtype).eps
