"""`VarlenAttention` in ONNX: bidirectional attention inside each segment of a packed sequence.

It has two portable bodies for any segments, equal in meaning: `attention`, on ONNX's own
`Attention` (opset 23), which TensorRT 10.14 and later fuses, and `matmul`, MatMul-Softmax-MatMul for
what came before. Both keep the softmax in float32 whatever the dtype of q, k and v. `packed` is for
TensorRT 11 alone, whose own op takes the segments as they are. Bodies for segments that lie in slots
of equal length are in `slot_bodies`.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from onnx.defs import OpSchema

from mmvision_export.ops.definition import FunctionBody, OpDefinition
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.ops.varlen_attention.slot_bodies import slot_bodies

__all__ = ["ATTENTION_OPSET", "VARLEN_ATTENTION", "AttentionBody", "attention_body_of"]

AttentionBody = Literal[
    "attention",
    "matmul",
    "packed",
    "uniform_attention",
    "uniform_matmul",
    "equal_attention",
    "equal_matmul",
]
"""Which ops define `VarlenAttention`."""

ATTENTION_OPSET = 23
"""First opset with ONNX `Attention`."""

# Patches of the same image share a segment number, the count of images that end at or before them.
# q @ k is then masked where the segments differ. The mask depends on cu_seqlens alone, so that
# after inlining the layers' masks are one common subexpression.
_SEGMENT_MASK = """
  num_patches_1d = Shape <start: int = 0, end: int = 1> (q)
  num_patches_int64 = Squeeze (num_patches_1d)
  num_patches = Cast <to: int = 6> (num_patches_int64)
  zero = Constant <value: tensor = int32 {0}> ()
  one = Constant <value: tensor = int32 {1}> ()
  index = Range (zero, num_patches, one)
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  slice_start = Constant <value_ints: ints = [1]> ()
  slice_end = Constant <value_ints: ints = [9223372036854775807]> ()
  ends = Slice (cu_seqlens, slice_start, slice_end, axis_0)
  ends_row = Unsqueeze (ends, axis_0)
  index_column = Unsqueeze (index, axis_1)
  image_has_ended = GreaterOrEqual (index_column, ends_row)
  image_has_ended_int = Cast <to: int = 6> (image_has_ended)
  segment = ReduceSum <keepdims: int = 0> (image_has_ended_int, axis_1)
  segment_row = Unsqueeze (segment, axis_0)
  segment_column = Unsqueeze (segment, axis_1)
  same_image = Equal (segment_column, segment_row)
"""

# [N, H, D] -> [1, H, N, D], and back.
_ATTENTION = """
  q_heads_first = Transpose <perm: ints = [1, 0, 2]> (q)
  k_heads_first = Transpose <perm: ints = [1, 0, 2]> (k)
  v_heads_first = Transpose <perm: ints = [1, 0, 2]> (v)
  q_batch = Unsqueeze (q_heads_first, axis_0)
  k_batch = Unsqueeze (k_heads_first, axis_0)
  v_batch = Unsqueeze (v_heads_first, axis_0)
  mask_axes = Constant <value_ints: ints = [0, 1]> ()
  mask = Unsqueeze (same_image, mask_axes)
  attended_batch = Attention <scale: float = @scale> (q_batch, k_batch, v_batch, mask)
  attended = Squeeze (attended_batch, axis_0)
  out = Transpose <perm: ints = [1, 0, 2]> (attended)
"""

# [N, H, D] -> q [H, N, D] @ k [H, D, N] -> [H, N, N] @ v [H, N, D] -> [N, H, D]. q is scaled before
# the product, where float16 has room, rather than the scores after it. The mask is added in
# float32: a finite number, since every row keeps at least itself, and low enough that exp() gives
# exactly 0.
_MATMUL = """
  scale_float = Constant <value_float: float = @scale> ()
  scale = CastLike (scale_float, q)
  q_scaled = Mul (q, scale)
  q_heads_first = Transpose <perm: ints = [1, 0, 2]> (q_scaled)
  k_transposed = Transpose <perm: ints = [1, 2, 0]> (k)
  v_heads_first = Transpose <perm: ints = [1, 0, 2]> (v)
  scores = MatMul (q_heads_first, k_transposed)
  scores_float = Cast <to: int = 1> (scores)
  kept = Constant <value_float: float = 0.0> ()
  masked = Constant <value_float: float = -1e30> ()
  mask = Where (same_image, kept, masked)
  scores_masked = Add (scores_float, mask)
  weights_float = Softmax <axis: int = -1> (scores_masked)
  weights = CastLike (weights_float, q)
  attended = MatMul (weights, v_heads_first)
  out = Transpose <perm: ints = [1, 0, 2]> (attended)
"""

# TensorRT's op has no scale: one that is given as an attribute is ignored without a word. The
# lengths of queries and of keys are equal, but must be two tensors (TensorRT-Edge-LLM,
# `vit_trt_attention`).
_PACKED = """
  scale_float = Constant <value_float: float = @scale> ()
  scale = CastLike (scale_float, q)
  q_scaled = Mul (q, scale)
  kv_lengths = Identity (cu_seqlens)
  out = trt.TRT_Attention <query_form = "packed_nhd", kv_form = "packed_nhd">
    (q_scaled, k, v, "", cu_seqlens, kv_lengths)
"""

VARLEN_ATTENTION = OpDefinition(
    name="VarlenAttention",
    torch_module="mmvision_export.ops.varlen_attention.torch_op",
    inputs={"q": "T", "k": "T", "v": "T", "cu_seqlens": "TIndex"},
    outputs={"out": "T"},
    attributes={"scale": OpSchema.AttrType.FLOAT},
    bodies={
        "attention": FunctionBody(_SEGMENT_MASK + _ATTENTION, lowest_opset=ATTENTION_OPSET),
        "matmul": FunctionBody(_SEGMENT_MASK + _MATMUL),
        "packed": FunctionBody(_PACKED, domains={"trt": 1}),
        **slot_bodies(attention_opset=ATTENTION_OPSET),
    },
)


def attention_body_of(model: ir.Model) -> AttentionBody | None:
    """Which portable body a model's `VarlenAttention` has, or None if it carries no definition."""
    function = model.functions.get((DOMAIN, VARLEN_ATTENTION.name, ""))
    if function is None:
        return None
    operators = {node.op_type for node in function}
    has_attention = "Attention" in operators
    # The length of a slot is a quotient. What lies in a slot is masked by an order, and what shares
    # a segment by equality.
    if "Div" not in operators:
        return "attention" if has_attention else "matmul"
    if "GreaterOrEqual" in operators:
        return "uniform_attention" if has_attention else "uniform_matmul"
    return "equal_attention" if has_attention else "equal_matmul"
