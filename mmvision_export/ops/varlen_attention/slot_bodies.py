"""`VarlenAttention` where every image lies in a slot of its own, and all slots are equally long.

N patches lie in S slots of L = N / S. S and L are shapes, and nothing is read on the host. q, k and v
become `[S, L, heads, head_dim]`: a batch of S attentions, which cost S * L^2 together. No image
can reach another, whatever its values are: what is computed of a slot uses that slot alone.

`uniform` has two segments for each slot, an image and its padding. A key mask `[S, 1, 1, L]`,
which every layer shares, leaves the padding out. A query of the padding sees the image's keys, so
that its result is finite; nobody reads the result. `equal` has one segment for each slot, an image
that fills the slot, and no mask.

Each has a form on ONNX `Attention` and one of two products and a softmax, as the bodies for any
segments have.
"""

from __future__ import annotations

from mmvision_export.ops.definition import FunctionBody

__all__ = ["slot_bodies"]

_PAIRS = """
  segments_per_slot = Constant <value_ints: ints = [2]> ()
"""
_SINGLES = """
  segments_per_slot = Constant <value_ints: ints = [1]> ()
"""

# `[S, L, heads, head_dim]` as a shape; sizes are [1] int64.
_SLOTS = """
  num_patches = Shape <start: int = 0, end: int = 1> (q)
  num_bounds = Shape <start: int = 0, end: int = 1> (cu_seqlens)
  one_int64 = Constant <value_ints: ints = [1]> ()
  num_segments = Sub (num_bounds, one_int64)
  num_slots = Div (num_segments, segments_per_slot)
  slot_patches = Div (num_patches, num_slots)
  heads_shape = Shape <start: int = 1, end: int = 3> (q)
  slots_shape = Concat <axis: int = 0> (num_slots, slot_patches, heads_shape)
  packed_shape = Concat <axis: int = 0> (num_patches, heads_shape)
"""

# cu_seqlens is [image 0 starts, image 0 ends, image 1 starts, ..., the last padding ends]. A patch
# is the image's where its index in the slot is at most the last of the image. The mask depends on
# cu_seqlens and sizes alone, so that after inlining the layers' masks are one common subexpression.
_KEY_MASK = """
  axis_0 = Constant <value_ints: ints = [0]> ()
  every_second = Constant <value_ints: ints = [2]> ()
  first_start = Constant <value_ints: ints = [0]> ()
  first_end = Constant <value_ints: ints = [1]> ()
  before_last = Constant <value_ints: ints = [-1]> ()
  behind_last = Constant <value_ints: ints = [9223372036854775807]> ()
  image_starts = Slice (cu_seqlens, first_start, before_last, axis_0, every_second)
  image_ends = Slice (cu_seqlens, first_end, behind_last, axis_0, every_second)
  image_patches = Sub (image_ends, image_starts)
  zero = Constant <value: tensor = int32 {0}> ()
  one = Constant <value: tensor = int32 {1}> ()
  image_last = Sub (image_patches, one)
  slot_patches_int64 = Squeeze (slot_patches)
  slot_length = Cast <to: int = 6> (slot_patches_int64)
  index = Range (zero, slot_length, one)
  image_axes = Constant <value_ints: ints = [1, 2, 3]> ()
  image_last_column = Unsqueeze (image_last, image_axes)
  of_image = GreaterOrEqual (image_last_column, index)
"""

# [N, H, D] -> [S, L, H, D] -> [S, H, L, D], and back.
_ATTENTION_IN = """
  q_slots = Reshape (q, slots_shape)
  k_slots = Reshape (k, slots_shape)
  v_slots = Reshape (v, slots_shape)
  q_heads_first = Transpose <perm: ints = [0, 2, 1, 3]> (q_slots)
  k_heads_first = Transpose <perm: ints = [0, 2, 1, 3]> (k_slots)
  v_heads_first = Transpose <perm: ints = [0, 2, 1, 3]> (v_slots)
"""
_ATTENTION_MASKED = """
  attended_heads = Attention <scale: float = @scale>
    (q_heads_first, k_heads_first, v_heads_first, of_image)
"""
_ATTENTION_FULL = """
  attended_heads = Attention <scale: float = @scale>
    (q_heads_first, k_heads_first, v_heads_first)
"""

# q [S, H, L, D] @ k [S, H, D, L] -> [S, H, L, L] @ v [S, H, L, D]. As in the body for any segments,
# q is scaled before the product, and the mask is a finite number, added in float32.
_MATMUL_IN = """
  scale_float = Constant <value_float: float = @scale> ()
  scale = CastLike (scale_float, q)
  q_scaled = Mul (q, scale)
  q_slots = Reshape (q_scaled, slots_shape)
  k_slots = Reshape (k, slots_shape)
  v_slots = Reshape (v, slots_shape)
  q_heads_first = Transpose <perm: ints = [0, 2, 1, 3]> (q_slots)
  k_transposed = Transpose <perm: ints = [0, 2, 3, 1]> (k_slots)
  v_heads_first = Transpose <perm: ints = [0, 2, 1, 3]> (v_slots)
  scores = MatMul (q_heads_first, k_transposed)
  scores_float = Cast <to: int = 1> (scores)
"""
_MATMUL_MASKED = """
  kept = Constant <value_float: float = 0.0> ()
  masked = Constant <value_float: float = -1e30> ()
  mask = Where (of_image, kept, masked)
  scores_masked = Add (scores_float, mask)
  weights_float = Softmax <axis: int = -1> (scores_masked)
"""
_MATMUL_FULL = """
  weights_float = Softmax <axis: int = -1> (scores_float)
"""
_MATMUL_OUT = """
  weights = CastLike (weights_float, q)
  attended_heads = MatMul (weights, v_heads_first)
"""

_OUT = """
  attended = Transpose <perm: ints = [0, 2, 1, 3]> (attended_heads)
  out = Reshape (attended, packed_shape)
"""


def slot_bodies(*, attention_opset: int) -> dict[str, FunctionBody]:
    """The bodies by name, the form on ONNX `Attention` first.

    Args:
        attention_opset: First opset with ONNX `Attention`.
    """
    pairs = "segments that are an image and its padding by turns, N / S patches together"
    full = "segments of N / S patches each"
    return {
        "uniform_attention": FunctionBody(
            _PAIRS + _SLOTS + _KEY_MASK + _ATTENTION_IN + _ATTENTION_MASKED + _OUT,
            lowest_opset=attention_opset,
            operands=pairs,
        ),
        "uniform_matmul": FunctionBody(
            _PAIRS + _SLOTS + _KEY_MASK + _MATMUL_IN + _MATMUL_MASKED + _MATMUL_OUT + _OUT,
            operands=pairs,
        ),
        "equal_attention": FunctionBody(
            _SINGLES + _SLOTS + _ATTENTION_IN + _ATTENTION_FULL + _OUT,
            lowest_opset=attention_opset,
            operands=full,
        ),
        "equal_matmul": FunctionBody(
            _SINGLES + _SLOTS + _MATMUL_IN + _MATMUL_FULL + _MATMUL_OUT + _OUT,
            operands=full,
        ),
    }
