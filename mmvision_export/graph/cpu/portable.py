"""What the CPU flavour takes over from the portable graph: its geometry and its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from mmvision_export.core.errors import ExportError
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.ops.registry import OPS

__all__ = ["PortableEncoder"]


@dataclasses.dataclass(frozen=True)
class PortableEncoder:
    """Values of a portable graph.

    Attributes:
        cos: `[N, rope_dim/2]`, of all layers' rotation.
        sin: As cos.
        cu_seqlens: `[num_images + 1]` int32.
        scale: Of attention.
        nodes: By name. A module with weights is one node, of its name.
    """

    cos: ir.Value
    sin: ir.Value
    cu_seqlens: ir.Value
    scale: float
    nodes: Mapping[str, ir.Node]

    @classmethod
    def of(cls, graph: ir.Graph) -> PortableEncoder:
        """Find them.

        Raises:
            ExportError: The graph is not float32, or not one that this package exports.
        """
        dtype = graph.inputs[0].dtype
        if dtype != ir.DataType.FLOAT:
            name = "no float type" if dtype is None else dtype.name.lower()
            raise ExportError(f"only a float32 graph has a CPU flavour, this one takes {name}")
        custom = {node.op_type: node for node in graph if node.domain == DOMAIN}
        if set(custom) != set(OPS):
            raise ExportError(
                f"an exported encoder has the custom ops {', '.join(sorted(OPS))}, this graph has "
                f"{', '.join(sorted(custom)) or 'none'}"
            )
        _, _, cos, sin = custom["QKRotaryEmbedding"].inputs
        _, _, _, cu_seqlens = custom["VarlenAttention"].inputs
        assert cos is not None and sin is not None and cu_seqlens is not None
        return cls(
            cos=cos,
            sin=sin,
            cu_seqlens=cu_seqlens,
            scale=custom["VarlenAttention"].attributes["scale"].as_float(),
            nodes={node.name or "": node for node in graph},
        )

    def parameters(self, module: str) -> Sequence[ir.Value]:
        """A module's weight, and its bias if it has one.

        Args:
            module: Its path, as `layers.0.mlp.fc1`.

        Raises:
            ExportError: The graph has no such module.
        """
        if module not in self.nodes:
            raise ExportError(f"the graph has no node of the module {module}")
        found = [value for value in self.nodes[module].inputs[1:] if value is not None]
        if not found or not all(value.is_initializer() for value in found):
            raise ExportError(f"the node of the module {module} has no weights")
        return found
