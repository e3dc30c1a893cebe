"""`VarlenAttention` in PyTorch, and the node that the tracer writes for it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvision_export.ops.domain import PLUGIN_ATTRIBUTES
from mmvision_export.ops.onnxscript_op import onnxscript_op
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION

__all__ = ["TORCH_OP", "onnx_node", "varlen_attention"]


@torch.library.custom_op("mmvision::VarlenAttention", mutates_args=())
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Bidirectional attention inside each segment of a packed sequence, segment by segment.

    Args:
        q: `[N, heads, head_dim]`, any float dtype.
        k: As q.
        v: As q.
        cu_seqlens: `[num_segments + 1]` int32, ascending from 0 to N.
        scale: Factor on q @ k.

    Returns:
        `[N, heads, head_dim]` in q's dtype.
    """
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        # [n, H, D] -> [1, H, n, D]
        q_segment, k_segment, v_segment = (
            x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)
        )
        attended = F.scaled_dot_product_attention(q_segment, k_segment, v_segment, scale=scale)
        # [1, H, n, D] -> [n, H, D]
        out[start:end] = attended.squeeze(0).transpose(0, 1)
    return out


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


TORCH_OP = torch.ops.mmvision.VarlenAttention.default
_NODE = onnxscript_op(VARLEN_ATTENTION)


def onnx_node(q: Any, k: Any, v: Any, cu_seqlens: Any, scale: float) -> Any:
    """The op as one ONNX node; arguments and result are symbolic values of the tracer."""
    return _NODE(q, k, v, cu_seqlens, scale=scale, **PLUGIN_ATTRIBUTES)
