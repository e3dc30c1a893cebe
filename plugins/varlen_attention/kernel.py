"""Flash attention over a packed sequence, one Triton kernel for every GPU from Ampere on.

O(N) memory, no mask, no padding, and no length computed on the host: `N // BLOCK_M + num_segments` programs per head
find their segment and tile in `cu_seqlens` on the device. float16 or bfloat16 in and out, float32 accumulation.

An engine's bucket has a segment for every image it may take. Those that a batch leaves empty follow the others, and
their programs return after one load.

A head whose size is no power of two is split into parts that are (80 = 64 + 16), so that nothing is padded.

References:
    FlashAttention-2 (https://arxiv.org/abs/2307.08691), algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["head_parts", "num_programs", "varlen_attention_kernel"]

MAX_HEAD_DIM = 128


def head_parts(head_dim: int) -> tuple[int, int, int]:
    """Split a head into at most three powers of two of at least 16, largest first; absent parts are 0.

    Raises:
        ValueError: The head is no multiple of 16 up to 128.
    """
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}")
    parts = [power for power in (128, 64, 32, 16) if head_dim & power]
    first, second, third = (*parts, 0, 0)[:3]
    return first, second, third


def num_programs(num_patches: int, num_segments: int, block_m: int) -> int:
    """First dimension of the grid; the second is the number of heads.

    Segment s owns the programs from `cu_seqlens[s] // block_m + s` on. That leaves it
    `cu_seqlens[s+1] // block_m - cu_seqlens[s] // block_m + 1` programs, which is never fewer than its
    `cdiv(length, block_m)` tiles; the rest return at once.

    Program p belongs to none of the segments before `p - num_patches // block_m`, for a segment's first program is at
    most `num_patches // block_m + s`, and to none after p.
    """
    return num_patches // block_m + num_segments


@triton.jit
def _load(base, rows, valid, row_stride, first: tl.constexpr, size: tl.constexpr):
    # [rows, size] of one head's part; rows that are not valid are 0.
    columns = first + tl.arange(0, size)
    return tl.load(
        base + rows[:, None].to(tl.int64) * row_stride + columns[None, :],
        mask=valid[:, None],
        other=0.0,
    )


@triton.jit
def _store(base, rows, valid, row_stride, values, first: tl.constexpr, size: tl.constexpr):
    columns = first + tl.arange(0, size)
    tl.store(
        base + rows[:, None].to(tl.int64) * row_stride + columns[None, :],
        values,
        mask=valid[:, None],
    )


@triton.jit
def varlen_attention_kernel(
    q_ptr,  # [N, H, D] contiguous
    k_ptr,  # [N, H, D]
    v_ptr,  # [N, H, D]
    cu_seqlens_ptr,  # [S + 1] int32
    out_ptr,  # [N, H, D]
    num_patches,  # N, int32
    num_segments,  # S, int32
    row_stride,  # H * D, int32
    scale_log2,  # scale * log2(e), float32
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head of one segment."""
    program = tl.program_id(0)
    head = tl.program_id(1)

    # Where the earliest segment that this program can belong to starts at the end, it and all after it are empty.
    earliest = program - num_patches // BLOCK_M
    if tl.load(cu_seqlens_ptr + earliest, mask=earliest >= 0, other=0) >= num_patches:
        return

    # The last segment whose first program is at or before this one.
    low = tl.maximum(earliest, 0)
    high = tl.minimum(num_segments, program + 1)
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(cu_seqlens_ptr + middle) // BLOCK_M + middle <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    start = tl.load(cu_seqlens_ptr + low)
    end = tl.load(cu_seqlens_ptr + low + 1)
    first_row = start + (program - (start // BLOCK_M + low)) * BLOCK_M

    if first_row < end:
        rows = first_row + tl.arange(0, BLOCK_M)
        row_valid = rows < end
        offset = head.to(tl.int64) * (D0 + D1 + D2)
        q_base, k_base, v_base, out_base = (
            q_ptr + offset,
            k_ptr + offset,
            v_ptr + offset,
            out_ptr + offset,
        )

        q0 = _load(q_base, rows, row_valid, row_stride, 0, D0)
        acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
        if D1 > 0:
            q1 = _load(q_base, rows, row_valid, row_stride, D0, D1)
            acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
        if D2 > 0:
            q2 = _load(q_base, rows, row_valid, row_stride, D0 + D1, D2)
            acc2 = tl.zeros([BLOCK_M, D2], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

        for first_key in range(start, end, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            key_valid = keys < end
            # [BLOCK_M, D] @ [D, BLOCK_N] -> [BLOCK_M, BLOCK_N], a sum over the parts of the head.
            k0 = _load(k_base, keys, key_valid, row_stride, 0, D0)
            scores = tl.dot(q0, tl.trans(k0))
            if D1 > 0:
                scores = tl.dot(
                    q1, tl.trans(_load(k_base, keys, key_valid, row_stride, D0, D1)), scores
                )
            if D2 > 0:
                scores = tl.dot(
                    q2, tl.trans(_load(k_base, keys, key_valid, row_stride, D0 + D1, D2)), scores
                )
            # In units of log2, so that the exponential is one instruction. Every row has at least one valid key in the
            # first block, so the running maximum is finite from there on.
            scores = tl.where(key_valid[None, :], scores * scale_log2, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(weights, axis=1)
            row_max = new_max
            weights_typed = weights.to(q0.dtype)
            v0 = _load(v_base, keys, key_valid, row_stride, 0, D0)
            acc0 = tl.dot(weights_typed, v0, acc0 * rescale[:, None])
            if D1 > 0:
                v1 = _load(v_base, keys, key_valid, row_stride, D0, D1)
                acc1 = tl.dot(weights_typed, v1, acc1 * rescale[:, None])
            if D2 > 0:
                v2 = _load(v_base, keys, key_valid, row_stride, D0 + D1, D2)
                acc2 = tl.dot(weights_typed, v2, acc2 * rescale[:, None])

        inverse = 1.0 / row_sum
        _store(out_base, rows, row_valid, row_stride, (acc0 * inverse[:, None]).to(q0.dtype), 0, D0)
        if D1 > 0:
            _store(
                out_base,
                rows,
                row_valid,
                row_stride,
                (acc1 * inverse[:, None]).to(q0.dtype),
                D0,
                D1,
            )
        if D2 > 0:
            _store(
                out_base,
                rows,
                row_valid,
                row_stride,
                (acc2 * inverse[:, None]).to(q0.dtype),
                D0 + D1,
                D2,
            )
