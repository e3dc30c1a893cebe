"""Inputs of attention, and the error that eager PyTorch makes on them."""

from __future__ import annotations

import numpy as np
import torch

from mmvision_export.models.minimax_m3_vl import reference
from tests.support.configs import relative_l2


def qkv(n: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, head_dim, generator=generator).to(dtype) for _ in range(3)]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


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
