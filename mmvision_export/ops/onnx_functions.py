"""The definition of each custom op as an ONNX function of standard ops, which the exported file carries with it.

A runtime without our plugins runs the function; TensorRT with our plugins ignores it. `VarlenAttention` has two bodies,
equal in meaning: `attention`, on ONNX's own `Attention` (opset 23), which TensorRT 10.14 and later fuses, and `matmul`,
MatMul-Softmax-MatMul for what came before. Both keep the softmax in float32 whatever the dtype of q, k and v. A third,
`packed`, is for TensorRT 11 alone, whose own op takes the segments as they are.

The bodies are written in ONNX's textual syntax
(https://github.com/onnx/onnx/blob/main/docs/Syntax.md): what is read here is what the file holds, node by node.
"""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_ir as ir

from mmvision_export.core.errors import ExportError
from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = [
    "ATTENTION_BODIES",
    "ATTENTION_OPSET",
    "AttentionBody",
    "attach_functions",
    "attention_body_of",
    "function_from_body",
]

AttentionBody = Literal["attention", "matmul", "packed"]
"""Which ops define `VarlenAttention`."""

ATTENTION_BODIES: tuple[AttentionBody, ...] = ("attention", "matmul")
"""The bodies of standard ops, which every runtime runs."""

_TENSORRT_DOMAIN = "trt"
_IMPORTS = {"packed": f', "{_TENSORRT_DOMAIN}": 1'}

ATTENTION_OPSET = 23
"""First opset with ONNX `Attention`; the `matmul` body and the rotary op need 18."""

_LOWEST_OPSET = 18

# Patches of the same image share a segment number, the count of images that end at or before them.
# q @ k is then masked where the segments differ. The mask depends on cu_seqlens alone, so that after inlining the
# layers' masks are one common subexpression.
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

_VARLEN_ATTENTION: dict[AttentionBody, str] = {
    # [N, H, D] -> [1, H, N, D], and back.
    "attention": """
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
""",
    # [N, H, D] -> q [H, N, D] @ k [H, D, N] -> [H, N, N] @ v [H, N, D] -> [N, H, D]. q is scaled before the product,
    # where float16 has room, rather than the scores after it. The mask is added in float32: a finite number, since
    # every row keeps at least itself, and low enough that exp() gives exactly 0.
    "matmul": """
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
""",
    # TensorRT's op has no scale: one that is given as an attribute is ignored without a word. The
    # lengths of queries and of keys are equal, but must be two tensors (TensorRT-Edge-LLM says so,
    # at `vit_trt_attention`).
    "packed": """
  scale_float = Constant <value_float: float = @scale> ()
  scale = CastLike (scale_float, q)
  q_scaled = Mul (q, scale)
  kv_lengths = Identity (cu_seqlens)
  out = trt.TRT_Attention <query_form = "packed_nhd", kv_form = "packed_nhd">
    (q_scaled, k, v, "", cu_seqlens, kv_lengths)
""",
}

# x [N, H, D] is split into the two halves of its rotated channels and the rest; cos and sin are [N, rope_dim/2].
_ROTATE = """
  {x}_first = Slice ({x}, zero, half, last_axis)
  {x}_second = Slice ({x}, half, rope_dim, last_axis)
  {x}_rest = Slice ({x}, rope_dim, no_end, last_axis)
  {x}_first_float = CastLike ({x}_first, cos)
  {x}_second_float = CastLike ({x}_second, cos)
  {x}_first_cos = Mul ({x}_first_float, cos_heads)
  {x}_second_sin = Mul ({x}_second_float, sin_heads)
  {x}_second_cos = Mul ({x}_second_float, cos_heads)
  {x}_first_sin = Mul ({x}_first_float, sin_heads)
  {x}_first_rotated = Sub ({x}_first_cos, {x}_second_sin)
  {x}_second_rotated = Add ({x}_second_cos, {x}_first_sin)
  {x}_rotated_float = Concat <axis: int = -1> ({x}_first_rotated, {x}_second_rotated)
  {x}_rotated = CastLike ({x}_rotated_float, {x})
  {x}_out = Concat <axis: int = -1> ({x}_rotated, {x}_rest)
"""
_QK_ROTARY_EMBEDDING = f"""
  half = Shape <start: int = 1, end: int = 2> (cos)
  rope_dim = Add (half, half)
  zero = Constant <value_ints: ints = [0]> ()
  no_end = Constant <value_ints: ints = [9223372036854775807]> ()
  last_axis = Constant <value_ints: ints = [2]> ()
  heads_axis = Constant <value_ints: ints = [1]> ()
  cos_heads = Unsqueeze (cos, heads_axis)
  sin_heads = Unsqueeze (sin, heads_axis)
{_ROTATE.format(x="q")}{_ROTATE.format(x="k")}"""

_SIGNATURES = {
    "VarlenAttention": ("scale, ", "(q, k, v, cu_seqlens) => (out)"),
    "QKRotaryEmbedding": ("", "(q, k, cos, sin) => (q_out, k_out)"),
}


def function_from_body(op_type: str, attention: AttentionBody, opset: int) -> onnx.FunctionProto:
    """The definition of one custom op.

    Args:
        op_type: `VarlenAttention` or `QKRotaryEmbedding`.
        attention: Body of `VarlenAttention`.
        opset: Version of the standard operators that the function imports.

    Raises:
        ExportError: The body needs a later opset.
    """
    lowest = ATTENTION_OPSET if attention == "attention" else _LOWEST_OPSET
    if opset < lowest:
        raise ExportError(
            f"the {attention!r} body of VarlenAttention needs opset {lowest} or later, got {opset}",
            hint="use the 'matmul' body" if attention == "attention" else None,
        )
    body = _QK_ROTARY_EMBEDDING
    if op_type == "VarlenAttention":
        body = ("" if attention == "packed" else _SEGMENT_MASK) + _VARLEN_ATTENTION[attention]
    attributes, signature = _SIGNATURES[op_type]
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["": {opset}{_IMPORTS.get(attention, "")}]>\n'
        f'{op_type} <{attributes}plugin_namespace: string = "{DOMAIN}", plugin_version: string = "{OP_VERSION}">\n'
        f"{signature} {{{body}}}"
    )
    # TensorRT names the layers it inlines after the nodes, and warns about each that has no name of its own.
    for node in function.node:
        node.name = f"{op_type}.{node.output[0]}"
    return function


def attach_functions(model: ir.Model, attention: AttentionBody) -> None:
    """Give a model the definitions of the custom ops, replacing those it has.

    Args:
        model: A graph with nodes of domain `mmvision`; changed in place.
        attention: Body of `VarlenAttention`; it must suit the model's opset.

    Raises:
        ExportError: The body needs a later opset than the model's.
    """
    opset = model.opset_imports[""]
    for op_type in _SIGNATURES:
        function = ir.serde.deserialize_function(function_from_body(op_type, attention, opset))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = OP_VERSION
    if attention == "packed":
        model.opset_imports[_TENSORRT_DOMAIN] = 1


def attention_body_of(model: ir.Model) -> AttentionBody | None:
    """Which body a model's `VarlenAttention` has, or None if it carries no definition."""
    function = model.functions.get((DOMAIN, "VarlenAttention", ""))
    if function is None:
        return None
    return "attention" if any(node.op_type == "Attention" for node in function) else "matmul"
