"""The graph for ONNX Runtime's CPU provider: integer products whose inputs are quantised while it runs, row by row.

Each patch has a scale of its own, from its own largest magnitude. Unlike ONNX's DynamicQuantizeLinear, whose one scale
is the whole batch's, this keeps a patch with massive activations from taking the precision of all others, and an
image's embeddings from depending on the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from mmvision_export.quantization.formats import INT8
from mmvision_export.quantization.units import Unit

__all__ = ["quantize_dynamically"]


def quantize_dynamically(model: ir.Model, units: Sequence[Unit], keep: Collection[str]) -> None:
    """Replace the products of all units, but those to keep, by integer products.

    Args:
        model: A float32 graph, balanced for the units that are quantised; changed in place. What is kept keeps its
            place in the weight file.
        units: All units.
        keep: Names of units that stay float32.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    maximum = _constant(graph, "int8_maximum", np.float32(INT8.maximum))
    # A row of zeros has a scale too.
    smallest = _constant(graph, "int8_smallest_scale", np.float32(1e-30))
    # Unsigned, as the fastest kernels take it, with zero in the middle.
    zero = _constant(graph, "uint8_zero_point", np.uint8(128))
    row_axis = _constant(graph, "int8_row_axis", np.array([1], np.int64))
    for unit in units:
        if unit.name in keep:
            continue
        readers = [nodes[linear.name] for linear in unit.linears]
        x = readers[0].inputs[0]
        assert x is not None

        def add(op_type: str, inputs: list[ir.Value], name: str, before: ir.Node, **attributes: int) -> ir.Value:
            node = ir.node(op_type, inputs, attributes=attributes, name=name)
            node.outputs[0].name = name
            graph.insert_before(before, node)
            return node.outputs[0]

        first, path = readers[0], f"{unit.name}.quantize"
        size = add("Abs", [x], f"{path}.Abs", first)
        largest = add("ReduceMax", [size, row_axis], f"{path}.ReduceMax", first, keepdims=0)
        exact_scale = add("Div", [largest, maximum], f"{path}.Div", first)
        scale = add("Max", [exact_scale, smallest], f"{path}.scale", first)  # [N]
        shape = add("Shape", [scale], f"{path}.Shape", first)
        zeros = add("Expand", [zero, shape], f"{path}.zero_point", first)
        stored = add("QuantizeLinear", [x, scale, zeros], f"{path}.QuantizeLinear", first, axis=0)  # [N, in] uint8
        column = add("Unsqueeze", [scale, row_axis], f"{path}.scale_column", first)  # [N, 1]
        for linear, node in zip(unit.linears, readers, strict=True):
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            exact = value.const_value
            scales = np.maximum(np.abs(exact.numpy()).max(axis=1), np.float32(1e-30)) / np.float32(INT8.maximum)

            def convert(exact: ir.TensorProtocol = exact, scales: np.ndarray = scales) -> ir.TensorProtocol:
                return ir.tensor(np.ascontiguousarray(INT8.quantized(exact.numpy(), scales[:, None]).T))

            name = f"{linear.weight}_int8"
            out, wide = (int(n) for n in exact.shape.numpy())
            tensor = ir.LazyTensor(convert, dtype=ir.DataType.INT8, shape=ir.Shape((wide, out)), name=name)
            weight = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            graph.register_initializer(weight)
            weight_scale = _constant(graph, f"{linear.weight}_scale", scales.astype(np.float32))
            product = add("MatMulInteger", [stored, weight, zero], f"{linear.name}.MatMulInteger", node)
            result = add("Cast", [product], f"{linear.name}.Cast", node, to=ir.DataType.FLOAT.value)
            result = add("Mul", [result, weight_scale], f"{linear.name}.Mul_channels", node)
            result = add("Mul", [result, column], f"{linear.name}.Mul_rows", node)
            if linear.bias is not None:
                bias = node.inputs[2]
                assert bias is not None
                result = add("Add", [result, bias], f"{linear.name}.Add", node)
            result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
            old = node.outputs[0]
            ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            result.name = old.name  # which for the last product is the graph's output's
            del graph.initializers[linear.weight]


def _constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value
