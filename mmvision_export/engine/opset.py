"""A graph declared as one of an earlier opset, for a parser that is documented for no later one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from mmvision_export.core.errors import EngineError

__all__ = ["retarget"]

# Operators whose versions between opsets 20 and 24 differ in the types that they admit and in
# attributes that the exporter leaves out, and in nothing else (onnx/docs/Changelog.md).
_ONLY_WIDENED = frozenset(
    {
        "Cast",
        "CastLike",
        "Constant",
        "Cos",
        "DequantizeLinear",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Reshape",
        "Shape",
        "Sin",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def retarget(model: ir.Model, latest: int) -> None:
    """Declare a graph as one of opset `latest`, if it is of a later one.

    Args:
        model: A graph without functions or subgraphs, with the types of its values; changed in
            place.
        latest: The last opset that the reader knows.

    Raises:
        EngineError: An operator means something else there, or is not there at all.
    """
    opset = model.opset_imports[""]
    if opset <= latest:
        return
    for node in model.graph:
        if node.domain == "":
            _refuse_if_different(node, opset, latest)
    model.opset_imports[""] = latest


def _refuse_if_different(node: ir.Node, opset: int, latest: int) -> None:
    place = f"{node.name}: {node.op_type} of opset {opset} cannot be written in opset {latest}"
    now = onnx.defs.get_schema(node.op_type, opset)
    try:
        then = onnx.defs.get_schema(node.op_type, latest)
    except onnx.defs.SchemaError as error:
        raise EngineError(f"{place}, which does not have it") from error
    if now.since_version != then.since_version and node.op_type not in _ONLY_WIDENED:
        raise EngineError(f"{place}, where it means something else")
    if added := sorted(set(node.attributes) - set(then.attributes)):
        raise EngineError(f"{place}, which has no {', '.join(added)}")
    for value, types in [*_typed(node.inputs, then.inputs), *_typed(node.outputs, then.outputs)]:
        if value.type is not None and _onnx_type(value) not in types:
            raise EngineError(f"{place}, which does not take {value.dtype}")


def _typed(
    values: Sequence[ir.Value | None], parameters: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> list[tuple[ir.Value, set[str]]]:
    """Each value with the types that its place admits; the last place is for all that follow it."""
    last = len(parameters) - 1
    return [
        (value, parameters[min(index, last)].types)
        for index, value in enumerate(values)
        if value is not None
    ]


def _onnx_type(value: ir.Value) -> str:
    assert value.dtype is not None
    names = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}
    return f"tensor({names.get(value.dtype, value.dtype.name.lower())})"
