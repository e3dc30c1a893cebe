"""Adding to a graph in place: constants, and nodes before another one."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["add_initializer", "add_node"]


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new constant of the graph."""
    tensor.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType | None = None,
    domain: str = "",
    **attributes: int,
) -> ir.Value:
    """The output of a new node, which stands before another one of the graph.

    Both are named the same.

    Args:
        before: The node it is put before.
        op_type: The operator.
        inputs: Its inputs.
        name: Of the node and of its output.
        dtype: Of the output, if what comes after has to know.
        domain: The operator's; by default ONNX's own.
        **attributes: Its attributes.
    """
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)
    node.outputs[0].name = name
    if dtype is not None:
        node.outputs[0].type = ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]
