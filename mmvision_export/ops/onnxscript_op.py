"""A custom op as onnxscript calls it, which is how the tracer of `torch.onnx` makes a node."""

from __future__ import annotations

from onnxscript.values import Op, Opset

from mmvision_export.ops.definition import OpDefinition
from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = ["onnxscript_op"]


def onnxscript_op(definition: OpDefinition) -> Op:
    """The op by its schema: called with symbolic inputs and attributes, it adds one node."""
    return Op(Opset(DOMAIN, OP_VERSION), definition.name, definition.schema)
