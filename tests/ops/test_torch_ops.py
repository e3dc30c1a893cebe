"""The torch ops against the reference, in every dtype; tolerances from eager PyTorch's error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.ops.qk_rotary_embedding.torch_op import qk_rotary_embedding
from mmvision_export.ops.registry import OPS
from mmvision_export.ops.varlen_attention.torch_op import varlen_attention
from tests.support.attention import cu, eager_attention_error, exact_attention, qkv
from tests.support.configs import relative_l2

SEGMENTS = st.lists(st.integers(1, 70), min_size=1, max_size=8)


@settings(max_examples=40)
@given(
    lengths=SEGMENTS,
    head_dim=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_attention_error_is_at_most_twice_eager(
    lengths: list[int], head_dim: int, dtype: str
) -> None:
    q, k, v = qkv(sum(lengths), 2, head_dim, getattr(torch, dtype))
    bounds, scale = cu(lengths), head_dim**-0.5
    out = varlen_attention(q, k, v, bounds, scale)
    assert out.dtype == q.dtype
    # With one key, eager is exact: leave room for the rounding of the result.
    limit = max(2 * eager_attention_error(q, k, v, bounds, scale), torch.finfo(q.dtype).eps)
    assert relative_l2(out.double(), exact_attention(q, k, v, bounds, scale)) <= limit


def test_attention_does_not_cross_segments() -> None:
    q, k, v = qkv(12, 2, 16, torch.float64)
    whole = varlen_attention(q, k, v, cu([12]), 0.25)
    split = varlen_attention(q, k, v, cu([5, 7]), 0.25)
    expected = exact_attention(q, k, v, cu([5, 7]), 0.25)
    assert relative_l2(split, expected) < 1e-14
    assert relative_l2(whole, expected) > 0.1  # the control: a leak between images is seen


@settings(max_examples=20)
@given(
    n=st.integers(1, 40),
    half=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_rotation_rounds_once(n: int, half: int, dtype: str) -> None:
    """Computed in float32 and cast back once: within one rounding of the result's own dtype."""
    q, k, _ = qkv(n, 2, 80, getattr(torch, dtype))
    angles = torch.randn(n, half, generator=torch.Generator().manual_seed(1))
    out = qk_rotary_embedding(q, k, angles.cos(), angles.sin())
    expected = reference.qk_rotary_embedding(
        q.double(), k.double(), angles.cos().double(), angles.sin().double()
    )
    for got, wanted in zip(out, expected, strict=True):
        assert got.dtype == q.dtype
        assert relative_l2(got.double(), wanted) <= torch.finfo(q.dtype).eps


def test_interleaved_pairs_are_told_apart() -> None:
    """The control: GPT-J's pairing (channels 2i and 2i + 1) is not NeoX's."""
    q, k, _ = qkv(3, 1, 80, torch.float64)
    angles = torch.randn(3, 39, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, _ = qk_rotary_embedding(q, k, angles.cos(), angles.sin())
    even, odd = q[..., 0:78:2], q[..., 1:78:2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    interleaved = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    assert relative_l2(interleaved, got[..., :78]) > 0.1


@pytest.mark.parametrize("op", OPS)
def test_ops_obey_the_rules_of_torch_library(op: str) -> None:
    """Schema, fake kernel and tracing agree with what the op does."""
    q, k, v = qkv(12, 2, 16, torch.float32)
    arguments = {
        "VarlenAttention": (q, k, v, cu([4, 8]), 0.25),
        "QKRotaryEmbedding": (q, k, torch.randn(12, 6), torch.randn(12, 6)),
    }[op]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.mmvision, op).default, arguments, test_utils=tests)
