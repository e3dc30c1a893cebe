"""The two custom operators of domain `mmvision`, as PyTorch ops and as ONNX operator schemas.

| op | inputs | attributes | outputs |
| --- | --- | --- | --- |
| `VarlenAttention` | q, k, v `[N, heads, head_dim]`, cu_seqlens int32 `[S + 1]` | scale | out, as q |
| `QKRotaryEmbedding` | q, k `[N, heads, head_dim]`, cos, sin float32 `[N, rope_dim/2]` | | q, k rotated |

The same name stands everywhere: `torch.ops.mmvision.VarlenAttention`, the ONNX node and its function, the TensorRT
plugin. `plugin_namespace` and `plugin_version` are attributes of every node because TensorRT's ONNX parser looks a
plugin up by them; other runtimes ignore them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnx.defs import OpSchema
from onnxscript.onnx_opset import opset18
from onnxscript.values import Op, Opset
from torch import Tensor

from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = ["qk_rotary_embedding", "translation_table", "varlen_attention"]

_PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}


@torch.library.custom_op("mmvision::VarlenAttention", mutates_args=())
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Bidirectional attention inside each segment of a packed sequence; eager PyTorch, segment by segment.

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


@torch.library.custom_op("mmvision::QKRotaryEmbedding", mutates_args=())
def qk_rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first `2 * cos.shape[1]` channels of q and k in NeoX pairs; the rest pass through.

    The rotation is computed in the dtype of cos and sin (float32; float64 in the float64 reference) and cast back.

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


def _schema(
    name: str, inputs: dict[str, str], outputs: dict[str, str], **attributes: OpSchema.AttrType
) -> OpSchema:
    types = {
        "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
        "TFloat": ["tensor(float)"],
        "TIndex": ["tensor(int32)"],
    }
    used = dict.fromkeys([*inputs.values(), *outputs.values()])
    plugin = dict.fromkeys(_PLUGIN_ATTRIBUTES, OpSchema.AttrType.STRING)
    return OpSchema(
        name,
        DOMAIN,
        OP_VERSION,
        inputs=[OpSchema.FormalParameter(n, t) for n, t in inputs.items()],
        outputs=[OpSchema.FormalParameter(n, t) for n, t in outputs.items()],
        type_constraints=[(name, types[name], "") for name in used],
        attributes=[OpSchema.Attribute(n, t, "") for n, t in {**attributes, **plugin}.items()],
    )


_OPSET = Opset(DOMAIN, OP_VERSION)
_VARLEN_ATTENTION = Op(
    _OPSET,
    "VarlenAttention",
    _schema(
        "VarlenAttention",
        {"q": "T", "k": "T", "v": "T", "cu_seqlens": "TIndex"},
        {"out": "T"},
        scale=OpSchema.AttrType.FLOAT,
    ),
)
_QK_ROTARY_EMBEDDING = Op(
    _OPSET,
    "QKRotaryEmbedding",
    _schema(
        "QKRotaryEmbedding",
        {"q": "T", "k": "T", "cos": "TFloat", "sin": "TFloat"},
        {"q_out": "T", "k_out": "T"},
    ),
)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How `torch.onnx.export` writes each op of this package as one ONNX node, for `custom_translation_table`."""

    def varlen_attention_node(q: Any, k: Any, v: Any, cu_seqlens: Any, scale: float) -> Any:
        return _VARLEN_ATTENTION(q, k, v, cu_seqlens, scale=scale, **_PLUGIN_ATTRIBUTES)

    def qk_rotary_embedding_node(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return _QK_ROTARY_EMBEDDING(q, k, cos, sin, **_PLUGIN_ATTRIBUTES)

    def floor_divide(a: Any, b: Any) -> Any:
        # Patch positions are non-negative integers, for which ONNX's truncating Div is the floor; the general
        # translation adds seven nodes to correct the sign.
        return opset18.Div(a, b)

    return {
        torch.ops.mmvision.VarlenAttention.default: varlen_attention_node,
        torch.ops.mmvision.QKRotaryEmbedding.default: qk_rotary_embedding_node,
        torch.ops.aten.floor_divide.default: floor_divide,
    }
