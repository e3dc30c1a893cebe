"""The running sum of a few integers as a masked sum, which every TensorRT computes without a loop.

`cu_seqlens` is the running sum of the images' patch counts. TensorRT's parsers before 10.8 import
ONNX's `CumSum` as a loop with a recurrence, and all of them document it for floats only. A masked
sum costs the square of the number of images, which is at most 65.
"""

from __future__ import annotations

import onnx_ir as ir

from mmvision_export.core.errors import EngineError
from mmvision_export.engine.definitions import call_definition

__all__ = ["masked_sums_from_cumsums"]

# terms [S] int32. Term j is part of sum i where j <= i: [S, 1] against [1, S].
_MASKED_SUM = """(terms) => (sums) {
  shape = Shape (terms)
  length = Squeeze (shape)
  count = Cast <to: int = 6> (length)
  zero = Constant <value: tensor = int32 {0}> ()
  one = Constant <value: tensor = int32 {1}> ()
  index = Range (zero, count, one)
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  sum_index = Unsqueeze (index, axis_1)
  term_index = Unsqueeze (index, axis_0)
  taken = GreaterOrEqual (sum_index, term_index)
  factors = Cast <to: int = 6> (taken)
  taken_terms = Mul (factors, terms)
  sums = ReduceSum <keepdims: int = 0> (taken_terms, axis_1)
}"""


def masked_sums_from_cumsums(model: ir.Model) -> None:
    """Define each `CumSum` as a masked sum, equal to the bit.

    Args:
        model: A graph; its nodes become calls of a definition, which is still to be inlined.

    Raises:
        EngineError: A `CumSum` is of another kind than the one that the exporter writes.
    """
    for node in model.graph:
        if node.op_type == "CumSum":
            _refuse_other_kinds(node)
            node.resize_inputs(1)  # without the axis
            call_definition(model, node, "MaskedSum", _MASKED_SUM)


def _refuse_other_kinds(node: ir.Node) -> None:
    terms, axis = node.inputs
    assert terms is not None
    assert axis is not None
    rank = None if terms.shape is None else len(terms.shape)
    if rank != 1 or terms.dtype != ir.DataType.INT32:
        raise EngineError(
            f"{node.name}: CumSum must be of an int32 vector, got rank {rank} of {terms.dtype}"
        )
    along = None if axis.const_value is None else int(axis.const_value.numpy().item())
    flags = [name for name in ("exclusive", "reverse") if node.attributes.get_int(name, 0)]
    if along not in (0, -1) or flags:
        raise EngineError(
            f"{node.name}: CumSum must run forwards along axis 0 and include its own term, got "
            f"axis {along}{''.join(f', {name}' for name in flags)}"
        )
