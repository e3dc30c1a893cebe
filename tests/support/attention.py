"""Inputs of attention, the kernel launched on them, and the error that eager PyTorch makes on them."""

from __future__ import annotations

import math

import numpy as np
import torch

from mmvision_export.kernels.compile import kernel_module
from mmvision_export.models.minimax_m3_vl import reference
from tests.support.configs import relative_l2


def qkv(n: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, head_dim, generator=generator).to(dtype) for _ in range(3)]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


def attention_by_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    block_m: int = 64,
    block_n: int = 32,
    told_patches: int | None = None,
) -> torch.Tensor:
    """Launch as the plugin does, in Triton's interpreter; the output starts as NaN.

    `told_patches` is the number of patches that the kernel is told, where that is to be wrong.
    """
    module = kernel_module("varlen_attention")
    n, heads, head_dim = q.shape
    out = torch.full_like(q, math.nan)
    segments = len(bounds) - 1
    module.varlen_attention_kernel[(module.num_programs(n, segments, block_m), heads)](
        q,
        k,
        v,
        bounds,
        out,
        n if told_patches is None else told_patches,
        segments,
        heads * head_dim,
        head_dim**-0.5 * math.log2(math.e),
        *module.head_parts(head_dim),
        block_m,
        block_n,
    )
    return out


def eager_attention_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> float:
    """Error of plain MatMul-Softmax-MatMul in the dtype of q."""
    pieces = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[start:end]))
    return relative_l2(torch.cat(pieces).double(), exact_attention(q, k, v, bounds, scale))


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> np.ndarray:
    return reference.varlen_attention(
        q.double(), k.double(), v.double(), bounds.numpy(), scale=scale
    )
