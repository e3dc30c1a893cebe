"""The one list of custom ops: a new op is its folder and one row here.

Whatever does something for every op goes through `OPS`. Reading it loads no PyTorch;
`translation_table` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from mmvision_export.ops.definition import OpDefinition
from mmvision_export.ops.domain import DOMAIN, OP_VERSION
from mmvision_export.ops.qk_rotary_embedding.onnx_op import QK_ROTARY_EMBEDDING
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION

__all__ = ["OPS", "attach_functions", "translation_table"]

OPS: dict[str, OpDefinition] = {
    op.name: op
    for op in (
        VARLEN_ATTENTION,
        QK_ROTARY_EMBEDDING,
    )
}
"""Op by name."""


def attach_functions(model: ir.Model, *, bodies: Mapping[str, str] | None = None) -> None:
    """Give a model the definitions of the custom ops, replacing those it has.

    Args:
        model: A graph with nodes of domain `mmvision`; changed in place.
        bodies: Op -> the body that defines it. Without one, the best portable body for the
            model's opset.

    Raises:
        ExportError: A body needs a later opset than the model's, or an op has no such body.
    """
    bodies = bodies or {}
    opset = model.opset_imports[""]
    for op in OPS.values():
        body = bodies.get(op.name) or op.portable_body(opset)
        function = ir.serde.deserialize_function(op.function(body, opset))
        model.functions[function.identifier()] = function
        model.opset_imports.update(op.bodies[body].domains)
    model.opset_imports[DOMAIN] = OP_VERSION


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Each custom op as one node, for `torch.onnx.export(custom_translation_table=...)`."""
    modules = [importlib.import_module(op.torch_module) for op in OPS.values()]
    return {module.TORCH_OP: module.onnx_node for module in modules}
