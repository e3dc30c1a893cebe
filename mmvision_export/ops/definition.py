"""What one custom op is to ONNX: its schema, and its definitions as functions of standard ops.

The exported file carries one definition of each op. A runtime without our plugins runs it; TensorRT
with our plugins ignores it. Bodies are written in ONNX's textual syntax
(https://github.com/onnx/onnx/blob/main/docs/Syntax.md): what is read here is what the file holds,
node by node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
from onnx.defs import OpSchema

from mmvision_export.core.errors import ExportError
from mmvision_export.ops.domain import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES

__all__ = ["FunctionBody", "OpDefinition"]

_TYPES = {
    "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
    "TFloat": ["tensor(float)"],
    "TIndex": ["tensor(int32)"],
}


@dataclasses.dataclass(frozen=True)
class FunctionBody:
    """One way to define an op.

    Attributes:
        nodes: In ONNX's textual syntax, from the op's inputs to its outputs.
        lowest_opset: First version of the standard operators that has all it uses.
        domains: Version by name of each other domain it uses.
        operands: What the op's operands must be, where it does not define the op for all of them:
            for people, and to tell which bodies can stand for one another.
    """

    nodes: str
    lowest_opset: int = 18
    domains: Mapping[str, int] = dataclasses.field(default_factory=dict)
    operands: str | None = None

    @property
    def portable(self) -> bool:
        """Whether it is made of standard operators alone, which every runtime has."""
        return not self.domains


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpDefinition:
    """A custom op as ONNX sees it.

    Attributes:
        name: Of the torch op, the ONNX node and function, and the TensorRT plugin.
        torch_module: Module of its PyTorch side, by name, since importing it needs PyTorch.
        inputs: Name -> type parameter: `T` any float type, `TFloat` float32, `TIndex` int32.
        outputs: As inputs.
        attributes: Those without a default; `PLUGIN_ATTRIBUTES` come on top.
        bodies: Its definitions by name, best first.
    """

    name: str
    torch_module: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    attributes: Mapping[str, OpSchema.AttrType]
    bodies: Mapping[str, FunctionBody]

    @property
    def schema(self) -> OpSchema:
        """The op's ONNX schema."""
        types = dict.fromkeys([*self.inputs.values(), *self.outputs.values()])
        attributes = {
            **self.attributes,
            **dict.fromkeys(PLUGIN_ATTRIBUTES, OpSchema.AttrType.STRING),
        }
        return OpSchema(
            self.name,
            DOMAIN,
            OP_VERSION,
            inputs=[OpSchema.FormalParameter(*parameter) for parameter in self.inputs.items()],
            outputs=[OpSchema.FormalParameter(*parameter) for parameter in self.outputs.items()],
            type_constraints=[(name, _TYPES[name], "") for name in types],
            attributes=[OpSchema.Attribute(name, kind, "") for name, kind in attributes.items()],
        )

    def portable_body(self, opset: int) -> str:
        """The name of the best body that every runtime of an opset runs, for any operands.

        Raises:
            ExportError: All need a later opset.
        """
        portable = {
            name: body
            for name, body in self.bodies.items()
            if body.portable and body.operands is None
        }
        for name, body in portable.items():
            if body.lowest_opset <= opset:
                return name
        lowest = min(body.lowest_opset for body in portable.values())
        raise ExportError(f"{self.name} needs opset {lowest} or later, got {opset}")

    def function(self, body: str, opset: int) -> onnx.FunctionProto:
        """The op's definition by one of its bodies.

        Args:
            body: One of `bodies`.
            opset: Version of the standard operators that the function imports.

        Raises:
            ExportError: There is no such body, or it needs a later opset.
        """
        if body not in self.bodies:
            raise ExportError(
                f"{self.name} has no body {body!r}", hint=f"it has {', '.join(self.bodies)}"
            )
        chosen = self.bodies[body]
        if opset < chosen.lowest_opset:
            lower = [
                name
                for name, other in self.bodies.items()
                if other.portable
                and other.lowest_opset <= opset
                and other.operands == chosen.operands
            ]
            raise ExportError(
                f"the {body!r} body of {self.name} needs opset {chosen.lowest_opset} or later, "
                f"got {opset}",
                hint=f"use the {lower[0]!r} body" if lower else None,
            )
        imports = {"": opset, **chosen.domains}
        attributes = [
            *self.attributes,
            *(f'{name}: string = "{value}"' for name, value in PLUGIN_ATTRIBUTES.items()),
        ]
        function = onnx.parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: [{_listed(imports)}]>\n'
            f"{self.name} <{', '.join(attributes)}>\n"
            f"({', '.join(self.inputs)}) => ({', '.join(self.outputs)}) {{{chosen.nodes}}}"
        )
        # TensorRT names the layers it inlines after the nodes, and warns about each that has no
        # name of its own.
        for node in function.node:
            node.name = f"{self.name}.{node.output[0]}"
        return function


def _listed(imports: Mapping[str, int]) -> str:
    return ", ".join(f'"{domain}": {version}' for domain, version in imports.items())
