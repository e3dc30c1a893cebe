"""`QKRotaryEmbedding` in PyTorch, and the node that the tracer writes for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmvision_export.ops.domain import PLUGIN_ATTRIBUTES
from mmvision_export.ops.onnxscript_op import onnxscript_op
from mmvision_export.ops.qk_rotary_embedding.onnx_op import QK_ROTARY_EMBEDDING

__all__ = ["TORCH_OP", "onnx_node", "qk_rotary_embedding"]


@torch.library.custom_op("mmvision::QKRotaryEmbedding", mutates_args=())
def qk_rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first `2 * cos.shape[1]` channels of q and k in NeoX pairs; the rest pass through.

    The rotation is computed in the dtype of cos and sin (float32; float64 in the float64 reference)
    and cast back.

    Args:
        q: `[N, heads, head_dim]`, any float dtype.
        k: As q.
        cos: `[N, rope_dim/2]` float32.
        sin: `[N, rope_dim/2]` float32.

    Returns:
        q and k, same shapes and dtype.

    References:
        RoFormer (https://arxiv.org/abs/2104.09864), in the half-split pairing of GPT-NeoX.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


@qk_rotary_embedding.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., 2 * half :]], dim=-1)


TORCH_OP = torch.ops.mmvision.QKRotaryEmbedding.default
_NODE = onnxscript_op(QK_ROTARY_EMBEDDING)


def onnx_node(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """The op as one ONNX node; arguments and result are symbolic values of the tracer."""
    return _NODE(q, k, cos, sin, **PLUGIN_ATTRIBUTES)
