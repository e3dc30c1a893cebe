"""The graph for ONNX Runtime's CPU provider.

Integer products whose inputs are quantised while it runs, row by row.

Each patch has a scale of its own, from its own largest magnitude. Unlike ONNX's
DynamicQuantizeLinear, whose one scale is the whole batch's, this keeps a patch with massive
activations from taking the precision of all others, and an image's embeddings from depending on the
other images of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from mmvision_export.graph.cpu.functions import CONTRIB
from mmvision_export.quantize.formats import INT8
from mmvision_export.quantize.nodes import add_initializer, add_node
from mmvision_export.quantize.units import Linear, Unit, readers_of

__all__ = ["make_weights_signed", "quantize_dynamically"]


_SMALLEST_SCALE = np.float32(1e-30)  # a row of zeros has a scale too
# Inputs and weights are unsigned, with zero in the middle. x86 processors without VNNI add two products of
# an unsigned and a signed byte in 16 bits, which saturates. ONNX Runtime can convert signed weights there
# (`session.x64quantprecision`), but not for a product in a subgraph, where a CPU flavour has its products
# (1.32). The kernels for two unsigned bytes are exact on every processor, and use neither VNNI nor AMX.
_ZERO_POINT = 128
_PRODUCT = "MatMulIntegerToFloat"
_WEIGHT = 1  # place among its inputs
_WEIGHT_ZERO = 5
_UNSIGNED_ZERO, _SIGNED_ZERO = "uint8_zero_point", "int8_zero_point"


def quantize_dynamically(model: ir.Model, units: Sequence[Unit], keep: Collection[str]) -> None:
    """Replace the products of all units, but those to keep, by integer products.

    Args:
        model: A float32 graph, its CPU flavour or the portable one, balanced for the units that are
            quantised; changed in place. What is kept keeps its place in the weight file.
        units: All units.
        keep: Names of units that stay float32.
    """
    constants = _constants(model.graph)
    model.opset_imports[CONTRIB] = 1
    for unit in units:
        if unit.name in keep:
            continue
        readers = readers_of(model, unit)
        rows = _quantized_rows(readers[0], unit, constants)
        for linear, node in zip(unit.linears, readers, strict=True):
            _replace_product(model.graph, node, linear, rows, constants)


@dataclasses.dataclass(frozen=True)
class _Constants:
    maximum: ir.Value  # of the format
    smallest_scale: ir.Value
    zero_point: ir.Value
    one: ir.Value
    row_axis: ir.Value


def _constants(graph: ir.Graph) -> _Constants:
    return _Constants(
        add_initializer(graph, "int8_maximum", ir.tensor(np.float32(INT8.maximum))),
        add_initializer(graph, "int8_smallest_scale", ir.tensor(_SMALLEST_SCALE)),
        add_initializer(graph, _UNSIGNED_ZERO, ir.tensor(np.uint8(_ZERO_POINT))),
        add_initializer(graph, "int8_scale_one", ir.tensor(np.float32(1))),
        add_initializer(graph, "int8_row_axis", ir.tensor(np.array([1], np.int64))),
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    stored: ir.Value  # [N, in] uint8
    scale: ir.Value  # [N, 1]


def _quantized_rows(reader: ir.Node, unit: Unit, constants: _Constants) -> _Rows:
    """What a unit's products read, quantised row by row, before the first of them."""
    x, path = reader.inputs[0], f"{unit.name}.quantize"
    assert x is not None
    size = add_node(reader, "Abs", [x], f"{path}.Abs")
    largest = add_node(
        reader, "ReduceMax", [size, constants.row_axis], f"{path}.ReduceMax", keepdims=0
    )
    exact_scale = add_node(reader, "Div", [largest, constants.maximum], f"{path}.Div")
    scale = add_node(reader, "Max", [exact_scale, constants.smallest_scale], f"{path}.scale")  # [N]
    shape = add_node(reader, "Shape", [scale], f"{path}.Shape")
    zeros = add_node(reader, "Expand", [constants.zero_point, shape], f"{path}.zero_point")
    stored = add_node(reader, "QuantizeLinear", [x, scale, zeros], f"{path}.QuantizeLinear", axis=0)
    column = add_node(reader, "Unsqueeze", [scale, constants.row_axis], f"{path}.scale_column")
    return _Rows(stored, column)


def _replace_product(
    graph: ir.Graph, node: ir.Node, linear: Linear, rows: _Rows, constants: _Constants
) -> None:
    weight, weight_scale = _integer_weight(graph, node, linear)
    # MatMulInteger, Cast and Mul in one pass. Its scale of the rows is one for all of them.
    zero = constants.zero_point
    result = add_node(
        node,
        _PRODUCT,
        [rows.stored, weight, constants.one, weight_scale, zero, zero],
        f"{linear.name}.{_PRODUCT}",
        domain=CONTRIB,
    )
    result = add_node(node, "Mul", [result, rows.scale], f"{linear.name}.Mul_rows")
    if linear.bias is not None:
        bias = node.inputs[2]
        assert bias is not None
        result = add_node(node, "Add", [result, bias], f"{linear.name}.Add")
    old = node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    result.name = old.name  # which for the last product is the graph's output's
    del graph.initializers[linear.weight]


def _integer_weight(graph: ir.Graph, node: ir.Node, linear: Linear) -> tuple[ir.Value, ir.Value]:
    """A product's weight `[in, out]` uint8 around 128, and its scales `[out]`, as new constants."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    exact = value.const_value  # [out, in]
    largest = np.abs(exact.numpy()).max(axis=1)
    scales = np.maximum(largest, _SMALLEST_SCALE) / np.float32(INT8.maximum)

    def convert() -> ir.TensorProtocol:
        signed = INT8.quantized(exact.numpy(), scales[:, None]).astype(np.int16)
        return ir.tensor(np.ascontiguousarray((signed + _ZERO_POINT).astype(np.uint8).T))

    name = f"{linear.weight}_uint8"
    shape = ir.Shape(reversed(exact.shape.numpy()))
    tensor = ir.LazyTensor(convert, dtype=ir.DataType.UINT8, shape=shape, name=name)
    return (
        add_initializer(graph, name, tensor),
        add_initializer(graph, f"{linear.weight}_scale", ir.tensor(scales.astype(np.float32))),
    )


def make_weights_signed(model: ir.Model) -> None:
    """Have the weights made signed when the graph is loaded: for processors with VNNI.

    A byte with its highest bit turned over and read as signed is 128 less. ONNX Runtime computes this
    once, as it computes whatever depends on constants alone.

    Args:
        model: What `quantize_dynamically` made; changed in place. Its initializers stay.
    """
    graph = model.graph
    highest_bit = graph.initializers[_UNSIGNED_ZERO]
    zero = add_initializer(graph, _SIGNED_ZERO, ir.tensor(np.int8(0)))
    first = graph[0]
    for node in list(model.graph.all_nodes()):
        if node.op_type != _PRODUCT:
            continue
        weight = node.inputs[_WEIGHT]
        assert weight is not None and weight.name is not None
        path = weight.name.removesuffix("_uint8")
        turned = add_node(first, "BitwiseXor", [weight, highest_bit], f"{path}.BitwiseXor")
        # To an integer type that lacks the value, ONNX's Cast keeps the low bits.
        signed = add_node(
            first,
            "Cast",
            [turned],
            f"{path}_int8",
            ir.DataType.INT8,
            to=ir.DataType.INT8.value,
        )
        node.replace_input_with(_WEIGHT, signed)
        node.replace_input_with(_WEIGHT_ZERO, zero)
