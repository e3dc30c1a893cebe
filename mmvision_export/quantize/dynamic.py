"""The graph for ONNX Runtime's CPU provider: integer products whose inputs are quantised while it runs, row by row.

Each patch has a scale of its own, from its own largest magnitude. Unlike ONNX's DynamicQuantizeLinear, whose one scale
is the whole batch's, this keeps a patch with massive activations from taking the precision of all others, and an
image's embeddings from depending on the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from mmvision_export.quantize.formats import INT8
from mmvision_export.quantize.nodes import add_initializer, add_node
from mmvision_export.quantize.units import Unit, readers_of

__all__ = ["quantize_dynamically"]


def quantize_dynamically(model: ir.Model, units: Sequence[Unit], keep: Collection[str]) -> None:
    """Replace the products of all units, but those to keep, by integer products.

    Args:
        model: A float32 graph, its CPU flavour or the portable one, balanced for the units that are quantised; changed
            in place. What is kept keeps its place in the weight file.
        units: All units.
        keep: Names of units that stay float32.
    """
    graph = model.graph
    maximum = add_initializer(graph, "int8_maximum", ir.tensor(np.float32(INT8.maximum)))
    # A row of zeros has a scale too.
    smallest = add_initializer(graph, "int8_smallest_scale", ir.tensor(np.float32(1e-30)))
    # Unsigned, as the fastest kernels take it, with zero in the middle.
    zero = add_initializer(graph, "uint8_zero_point", ir.tensor(np.uint8(128)))
    row_axis = add_initializer(graph, "int8_row_axis", ir.tensor(np.array([1], np.int64)))
    for unit in units:
        if unit.name in keep:
            continue
        readers = readers_of(model, unit)
        x = readers[0].inputs[0]
        assert x is not None

        first, path = readers[0], f"{unit.name}.quantize"
        size = add_node(first, "Abs", [x], f"{path}.Abs")
        largest = add_node(first, "ReduceMax", [size, row_axis], f"{path}.ReduceMax", keepdims=0)
        exact_scale = add_node(first, "Div", [largest, maximum], f"{path}.Div")
        scale = add_node(first, "Max", [exact_scale, smallest], f"{path}.scale")  # [N]
        shape = add_node(first, "Shape", [scale], f"{path}.Shape")
        zeros = add_node(first, "Expand", [zero, shape], f"{path}.zero_point")
        stored = add_node(
            first, "QuantizeLinear", [x, scale, zeros], f"{path}.QuantizeLinear", axis=0
        )  # [N, in] uint8
        column = add_node(first, "Unsqueeze", [scale, row_axis], f"{path}.scale_column")  # [N, 1]
        for linear, node in zip(unit.linears, readers, strict=True):
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            exact = value.const_value
            scales = np.maximum(np.abs(exact.numpy()).max(axis=1), np.float32(1e-30)) / np.float32(
                INT8.maximum
            )

            def convert(
                exact: ir.TensorProtocol = exact, scales: np.ndarray = scales
            ) -> ir.TensorProtocol:
                return ir.tensor(
                    np.ascontiguousarray(INT8.quantized(exact.numpy(), scales[:, None]).T)
                )

            name = f"{linear.weight}_int8"
            out, wide = (int(n) for n in exact.shape.numpy())
            tensor = ir.LazyTensor(
                convert, dtype=ir.DataType.INT8, shape=ir.Shape((wide, out)), name=name
            )
            weight = add_initializer(graph, name, tensor)
            weight_scale = add_initializer(
                graph, f"{linear.weight}_scale", ir.tensor(scales.astype(np.float32))
            )
            product = add_node(
                node, "MatMulInteger", [stored, weight, zero], f"{linear.name}.MatMulInteger"
            )
            result = add_node(
                node, "Cast", [product], f"{linear.name}.Cast", to=ir.DataType.FLOAT.value
            )
            result = add_node(node, "Mul", [result, weight_scale], f"{linear.name}.Mul_channels")
            result = add_node(node, "Mul", [result, column], f"{linear.name}.Mul_rows")
            if linear.bias is not None:
                bias = node.inputs[2]
                assert bias is not None
                result = add_node(node, "Add", [result, bias], f"{linear.name}.Add")
            result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
            old = node.outputs[0]
            ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
            result.name = old.name  # which for the last product is the graph's output's
            del graph.initializers[linear.weight]
