"""`QKRotaryEmbedding` in ONNX: rotates the first channels of q and k in NeoX pairs, in float32.

The channels that follow pass through.
"""

from __future__ import annotations

from mmvision_export.ops.definition import FunctionBody, OpDefinition

__all__ = ["QK_ROTARY_EMBEDDING"]

# x [N, H, D] is split into the two halves of its rotated channels and the rest; cos and sin are [N,
# rope_dim/2].
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
_BODY = f"""
  half = Shape <start: int = 1, end: int = 2> (cos)
  rope_dim = Add (half, half)
  zero = Constant <value_ints: ints = [0]> ()
  no_end = Constant <value_ints: ints = [9223372036854775807]> ()
  last_axis = Constant <value_ints: ints = [2]> ()
  heads_axis = Constant <value_ints: ints = [1]> ()
  cos_heads = Unsqueeze (cos, heads_axis)
  sin_heads = Unsqueeze (sin, heads_axis)
{_ROTATE.format(x="q")}{_ROTATE.format(x="k")}"""

QK_ROTARY_EMBEDDING = OpDefinition(
    name="QKRotaryEmbedding",
    torch_module="mmvision_export.ops.qk_rotary_embedding.torch_op",
    inputs={"q": "T", "k": "T", "cos": "TFloat", "sin": "TFloat"},
    outputs={"q_out": "T", "k_out": "T"},
    attributes={},
    bodies={"standard": FunctionBody(_BODY)},
)
