"""What the CPU flavour's operators are, as functions of ONNX Runtime's.

ONNX Runtime runs these where no kernels of ours are at hand. They are written in ONNX's textual
syntax (https://github.com/onnx/onnx/blob/main/docs/Syntax.md); the operators of `com.microsoft` are
described in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["CONTRIB", "cpu_functions"]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_LINEAR = """
<domain: "mmvision", opset_import: ["": {opset}]>
Linear (x, weight, bias) => (y) {{
  y = Gemm <transB: int = 1> (x, weight, bias)
}}
"""

_LINEAR_GELU = """
<domain: "mmvision", opset_import: ["": {opset}, "com.microsoft": 1]>
LinearGelu (x, weight, bias) => (y) {{
  inner = Gemm <transB: int = 1> (x, weight, bias)
  y = com.microsoft.Gelu (inner)
}}
"""

# Attention of each segment by itself, in a flash kernel whose memory is linear. What remains behind
# the last segment may be anything finite.
_VARLEN_ATTENTION = """
<domain: "mmvision", opset_import: ["": {opset}, "com.microsoft": 1]>
VarlenAttention <scale> (q, k, v, cu_seqlens) => (out) {{
  zero = Constant <value_ints: ints = [0]> ()
  one = Constant <value_ints: ints = [1]> ()
  minus_1 = Constant <value_ints: ints = [-1]> ()
  true = Constant <value: tensor = bool {{1}}> ()
  packed = Constant <value_ints: ints = [0, -1]> ()
  q_packed = Reshape (q, packed)
  k_packed = Reshape (k, packed)
  v_packed = Reshape (v, packed)
  bounds = Cast <to: int = 7> (cu_seqlens)
  num_bounds = Size (bounds)
  one_scalar = Squeeze (one)
  num_segments = Sub (num_bounds, one_scalar)
  none = SequenceEmpty <dtype: int = 1> ()
  segments = Loop (num_segments, true, none) <
    body: graph = segment (int64 index, bool go_on, seq(float[rows, hidden]) before)
      => (bool go_on_out, seq(float[rows, hidden]) after) {{
    go_on_out = Identity (go_on)
    first_bound = Unsqueeze (index, zero)
    second_bound = Add (first_bound, one)
    start = Gather (bounds, first_bound)
    end = Gather (bounds, second_bound)
    q_rows = Slice (q_packed, start, end, zero)
    k_rows = Slice (k_packed, start, end, zero)
    v_rows = Slice (v_packed, start, end, zero)
    q_segment = Unsqueeze (q_rows, zero)
    k_segment = Unsqueeze (k_rows, zero)
    v_segment = Unsqueeze (v_rows, zero)
    segment_out = com.microsoft.MultiHeadAttention <
      num_heads: int = {heads}, scale: float = @scale> (q_segment, k_segment, v_segment)
    rows_out = Squeeze (segment_out, zero)
    after = SequenceInsert (before, rows_out)
  }}>
  last_bound = Gather (bounds, minus_1)
  num_rows = Shape <start: int = 0, end: int = 1> (v)
  behind = Slice (v_packed, last_bound, num_rows, zero)
  all_rows = SequenceInsert (segments, behind)
  out_packed = ConcatFromSequence <axis: int = 0> (all_rows)
  shape = Shape (q)
  out = Reshape (out_packed, shape)
}}
"""


def cpu_functions(*, opset: int, heads: int) -> list[ir.Function]:
    """The definitions of `Linear`, `LinearGelu` and `VarlenAttention`.

    Args:
        opset: Version of the standard operators.
        heads: Attention heads, which `MultiHeadAttention` takes as a constant.
    """
    texts = (_LINEAR, _LINEAR_GELU, _VARLEN_ATTENTION)
    return [
        ir.serde.deserialize_function(
            onnx.parser.parse_function(text.format(opset=opset, heads=heads))
        )
        for text in texts
    ]
