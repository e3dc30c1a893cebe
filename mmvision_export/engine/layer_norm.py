"""LayerNormalization for strongly typed networks, with its statistics in float32.

ONNX asks for float32 statistics with `stash_type`. TensorRT's parsers do not pass that on to a
strongly typed network, whose types are those of the operands:

| TensorRT | what its parser does with `stash_type` | written here as |
| --- | --- | --- |
| before 10.6 | sets a precision, which the network refuses | separate operators, in float32 |
| from 10.6 on | leaves it aside | LayerNormalization between casts to float32 and back |

See `parser_support` for where that was read. `INormalizationLayer::setComputePrecision` in
NvInfer.h of 10.1 to 10.16: "Strongly typed network rejects calls to this method since the compute
precision is typically controlled by casting the input tensors to the desired type."
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from mmvision_export.core.errors import EngineError
from mmvision_export.engine.definitions import call_definition
from mmvision_export.engine.parser_support import ParserVersion, operator_row

__all__ = ["LayerNormForm", "float32_layer_norms", "layer_norm_form_for_parser"]

LayerNormForm = Literal["whole", "separate"]
"""One LayerNormalization, or the products and sums that it is made of."""

# x [N, C], weight and bias [C], all of one type; y as x. Only y is rounded to that type.
_SIGNATURE = "(x, weight, bias) => (y)"
_FLOAT32 = """
  x_float = Cast <to: int = 1> (x)
  weight_float = Cast <to: int = 1> (weight)
  bias_float = Cast <to: int = 1> (bias)
"""
_BODIES: dict[LayerNormForm, str] = {
    "whole": f"""{_SIGNATURE} {{{_FLOAT32}
  y_float = LayerNormalization <axis: int = -1, epsilon: float = @epsilon>
    (x_float, weight_float, bias_float)
  y = CastLike (y_float, x)
}}""",
    # The variance is the mean of squared differences: E[x^2] - E[x]^2 would cancel.
    "separate": f"""{_SIGNATURE} {{{_FLOAT32}
  last_axis = Constant <value_ints: ints = [-1]> ()
  mean = ReduceMean (x_float, last_axis)
  centred = Sub (x_float, mean)
  squared = Mul (centred, centred)
  variance = ReduceMean (squared, last_axis)
  epsilon = Constant <value_float: float = @epsilon> ()
  variance_positive = Add (variance, epsilon)
  deviation = Sqrt (variance_positive)
  normalized = Div (centred, deviation)
  scaled = Mul (normalized, weight_float)
  y_float = Add (scaled, bias_float)
  y = CastLike (y_float, x)
}}""",
}


def layer_norm_form_for_parser(parser: ParserVersion) -> LayerNormForm:
    """How LayerNormalization is written for a TensorRT's parser."""
    row = operator_row("", "LayerNormalization", parser)
    return "whole" if row is not None and row.imported_as == "layers" else "separate"


def float32_layer_norms(model: ir.Model, form: LayerNormForm) -> None:
    """Define each LayerNormalization in float32.

    Args:
        model: A graph; its nodes become calls of a definition, which is still to be inlined. A
            float32 node that is written as a whole stays as it is.
        form: How it is written.

    Raises:
        EngineError: A LayerNormalization is of another kind than the one the exporter writes.
    """
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain != "":
            continue
        _refuse_other_kinds(node)
        if form == "whole" and all(x is None or x.dtype == ir.DataType.FLOAT for x in node.inputs):
            continue
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        call_definition(
            model, node, f"LayerNorm_{form}", _BODIES[form], attributes={"epsilon": epsilon}
        )


def _refuse_other_kinds(node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    last = None if x.shape is None else len(x.shape) - 1
    axis = node.attributes.get_int("axis", -1)
    stash_type = node.attributes.get_int("stash_type", 1)
    if axis not in (-1, last) or stash_type != 1 or len(node.inputs) != 3 or len(node.outputs) != 1:
        raise EngineError(
            f"{node.name}: LayerNormalization must be over the last axis, with scale, bias and "
            f"float32 statistics and without further outputs, got axis {axis}, stash_type "
            f"{stash_type}, {len(node.inputs)} inputs, {len(node.outputs)} outputs"
        )
