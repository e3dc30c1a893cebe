"""Nodes of a graph turned into calls of a definition, for the inliner to put the definition there.

A definition is written in ONNX's textual syntax, as those of the custom ops are. What it makes of a
node keeps the node's name in front (`layers.3.layer_norm1.variance`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.parser
import onnx_ir as ir

__all__ = ["call_definition"]

_DOMAIN = "mmvision.engine"


def call_definition(
    model: ir.Model,
    node: ir.Node,
    name: str,
    body: str,
    *,
    attributes: Mapping[str, float] | None = None,
) -> None:
    """Make a node a call of a definition.

    Args:
        model: Gets the definition, unless it has it already.
        node: Changed in place; its inputs and outputs must be those of the definition.
        name: Of the definition.
        body: Signature and nodes, as `(x) => (y) { y = Abs (x) }`.
        attributes: What the body refers to as `@name`; they replace the node's.
    """
    attributes = attributes or {}
    opset = model.opset_imports[""]
    node.domain, node.op_type, node.version = _DOMAIN, name, 1
    node.attributes.clear()
    for key, value in attributes.items():
        node.attributes.add(ir.AttrFloat32(key, value))
    if node.op_identifier() not in model.functions:
        declared = f"<{', '.join(attributes)}>" if attributes else ""
        function = ir.serde.deserialize_function(
            onnx.parser.parse_function(
                f'<domain: "{_DOMAIN}", opset_import: ["": {opset}]>\n{name} {declared} {body}'
            )
        )
        model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1
