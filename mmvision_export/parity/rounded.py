"""A float16 or bfloat16 graph as a float32 one that rounds every result.

ONNX Runtime's CPU provider is no judge of a float16 graph: it has few float16 kernels, computes the
rest in float32, and takes away the casts it put between them, so that values float16 cannot hold
pass from one operator to the next, and an overflow that a GPU would show stays hidden. Of bfloat16
it runs next to nothing. Here every product, norm and activation is computed in float32, as a GPU's
are, and its result is rounded, as a GPU's is. The casts are the graph's own, which ONNX Runtime
(1.17 and later) does not remove.

What this does not model: kernels that accumulate in the narrow type, and rounding inside a fused
attention kernel.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mmvision_export.core.errors import ParityError
from mmvision_export.core.precision import FLOAT_PRECISIONS, PRECISIONS
from mmvision_export.graph.passes import inline_functions

__all__ = ["rounded_model"]

_FLOAT = ir.DataType.FLOAT
_NARROW = {
    name: ir.DataType[PRECISIONS[name].onnx_type] for name in FLOAT_PRECISIONS if name != "fp32"
}
# What these give is among what they take, which has been rounded.
_MOVEMENT = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
# These make a value of the narrow type by themselves, from another type.
_CONVERSIONS = frozenset({"Cast", "CastLike", "Constant"})
_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def rounded_model(model: ir.Model, float_type: str) -> ir.Model:
    """The graph with each value of its float type held in float32 and rounded.

    Args:
        model: A graph of this float type; its functions are inlined in place. Weights stay where
            they are, in their own type, and are converted when a runtime loads them.
        float_type: fp16 or bf16; a graph in fp32 needs none of this and is given back as it is.

    Returns:
        A graph with the same inputs and outputs.

    Raises:
        ParityError: The graph has control flow, which this does not go into, or a value whose type
            nothing tells.
    """
    if float_type not in _NARROW:
        return model
    narrow = _NARROW[float_type]
    inline_functions(model)
    _refuse_control_flow(model.graph)
    # What was inlined has no types yet.
    typed = ir.serde.deserialize_model(
        onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model))
    )
    graph = typed.graph
    nodes = list(graph)
    _refuse_untyped(nodes)
    outputs = set(graph.outputs)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype == narrow:
            graph.insert_before(nodes[0], _widened(value))
    for node in nodes:
        for value in node.outputs:
            if value.dtype != narrow:
                continue
            if node.op_type in _MOVEMENT and value not in outputs:
                value.type = ir.TensorType(_FLOAT)
            elif node.op_type in _CONVERSIONS:
                _widen_conversion(graph, node, value, narrow)
            else:
                _round(graph, node, value, narrow)
    return typed


def _refuse_control_flow(graph: ir.Graph) -> None:
    for node in graph:
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            raise ParityError(
                f"node {node.name} has control flow ({node.op_type}), and rounding cannot be inserted into it"
            )


def _refuse_untyped(nodes: list[ir.Node]) -> None:
    for node in nodes:
        if any(value.dtype is None for value in node.outputs if value.name):
            raise ParityError(f"the output type of node {node.name} ({node.op_type}) is unknown")


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": to.value}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(to)
    node.outputs[0].shape = value.shape
    return node


def _widened(value: ir.Value) -> ir.Node:
    """A cast of a value of the narrow type to float32, which takes its place."""
    uses = list(value.uses())
    node = _cast(value, _FLOAT, f"{value.name}.float")
    for user, index in uses:
        user.replace_input_with(index, node.outputs[0])
    return node


def _widen_conversion(graph: ir.Graph, node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    if node.op_type == "CastLike":
        # What it takes its type from is float32 now.
        like = node
        node = ir.node("Cast", [like.inputs[0]], attributes={"to": narrow.value}, name=like.name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
            value.name,
            value.type,
            value.shape,
        )
        value.name = None
        graph.insert_after(like, node)
        for user, index in list(value.uses()):
            user.replace_input_with(index, node.outputs[0])
        graph.remove(like, safe=True)
        value = node.outputs[0]
    graph.insert_after(node, _widened(value))


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Round a value, which passes its name on.

    The nodes that do it are named after the one that made it.
    """
    name = value.name
    prefix = f"{node.name}." if len(node.outputs) == 1 else f"{node.name}.{value.index()}."
    uses = list(value.uses())
    value.type, value.name = ir.TensorType(_FLOAT), f"{name}.unrounded"
    down = _cast(value, narrow, f"{prefix}rounded")
    graph.insert_after(node, down)
    if value in graph.outputs:
        down.outputs[0].name = name
        graph.outputs[graph.outputs.index(value)] = down.outputs[0]
        return
    up = _cast(down.outputs[0], _FLOAT, f"{prefix}widened")
    up.outputs[0].name = name
    graph.insert_after(down, up)
    for user, index in uses:
        user.replace_input_with(index, up.outputs[0])
