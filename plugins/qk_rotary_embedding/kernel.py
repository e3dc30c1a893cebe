"""Rotation of q and k in one launch, float32 inside, for partial RoPE in NeoX pairs.

One program rotates one head of BLOCK_N patches, of q or of k: a pure stream, each element read and written once.

References:
    RoFormer (https://arxiv.org/abs/2104.09864), in the half-split pairing of GPT-NeoX.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK_N", "HEAD_BLOCK", "qk_rotary_embedding_kernel"]

HEAD_BLOCK = 128
"""Channels a program has room for, so that one compiled kernel serves every head_dim up to it."""

BLOCK_N = 16
"""Patches of one program."""


@triton.jit
def qk_rotary_embedding_kernel(
    q_ptr,  # [N, H, D] contiguous
    k_ptr,  # [N, H, D]
    cos_ptr,  # [N, R/2] float32
    sin_ptr,  # [N, R/2] float32
    q_out_ptr,  # [N, H, D]
    k_out_ptr,  # [N, H, D]
    num_patches,  # N, int32
    num_heads,  # H, int32
    head_dim,  # D, int32, at most CHANNELS
    half,  # R/2, int32; channel i is paired with channel i + R/2, and those from R on pass through
    CHANNELS: tl.constexpr,  # HEAD_BLOCK
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N patches of one head of q (third grid index 0) or k (1)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    source, target = q_ptr, q_out_ptr
    if tl.program_id(2) == 1:
        source, target = k_ptr, k_out_ptr

    channel = tl.arange(0, CHANNELS)
    is_first = channel < half
    is_rotated = channel < 2 * half
    partner = tl.where(is_first, channel + half, channel - half)
    pair = tl.where(is_first, channel, channel - half)

    row_valid = rows < num_patches
    valid = row_valid[:, None] & (channel < head_dim)[None, :]
    rotated = row_valid[:, None] & is_rotated[None, :]
    base = rows[:, None].to(tl.int64) * num_heads * head_dim + head * head_dim
    angle = rows[:, None].to(tl.int64) * half + pair[None, :]

    # y[i] = x[i] cos - x[i + R/2] sin;  y[i + R/2] = x[i + R/2] cos + x[i] sin
    x = tl.load(source + base + channel[None, :], mask=valid, other=0.0)
    other = tl.load(source + base + partner[None, :], mask=rotated, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0)
    signed = tl.where(is_first[None, :], -sin, sin)
    result = tl.where(is_rotated[None, :], (x.to(tl.float32) * cos + other * signed).to(x.dtype), x)
    tl.store(target + base + channel[None, :], result, mask=valid)
