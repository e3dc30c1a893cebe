"""What is quantised together: the products that read one tensor.

q, k and v read one layer norm's output. They share its quantised form, and either all of them are
quantised or none is: a runtime fuses them into one product only if they are of one type.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

__all__ = ["Linear", "Unit", "readers_of", "units_of"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A Gemm `x @ weight.T + bias` with constant weights `[out, in]`.

    Attributes:
        name: Of its node, and of its output.
        weight: Name of the initializer.
        bias: Name of the initializer, or None.
    """

    name: str
    weight: str
    bias: str | None


@dataclasses.dataclass(frozen=True)
class Unit:
    """The products that read one tensor.

    Attributes:
        name: For people: the products' common path.
        input: Name of the tensor `[N, in]`.
        linears: The products.
        normed: Whether a LayerNormalization makes the tensor.
    """

    name: str
    input: str
    linears: tuple[Linear, ...]
    normed: bool


def units_of(model: ir.Model) -> list[Unit]:
    """Every product with constant weights in the main graph, in order.

    Attention's own products are not among them.
    """
    nodes: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if (
            node.op_type == "Gemm"
            and node.inputs[1] is not None
            and node.inputs[1].is_initializer()
        ):
            assert node.inputs[0] is not None and node.inputs[0].name is not None
            nodes.setdefault(node.inputs[0].name, []).append(node)
    units = []
    for value, readers in nodes.items():
        source = readers[0].inputs[0]
        assert source is not None
        producer = source.producer()
        normed = producer is not None and producer.op_type == "LayerNormalization"
        linears = tuple(_linear(node) for node in readers)
        name = linears[0].name if len(linears) == 1 else linears[0].name.rpartition(".")[0] + ".qkv"
        units.append(Unit(name, value, linears, normed))
    return units


def readers_of(model: ir.Model, unit: Unit) -> list[ir.Node]:
    """The nodes of a unit's products, in their order, wherever they stand.

    A flavour may have them in subgraphs.

    They are found by the weights they read, whose names all graphs of a model directory share.
    """
    nodes = []
    for linear in unit.linears:
        (node,) = model.graph.initializers[linear.weight].consumers()
        nodes.append(node)
    return nodes


def _linear(node: ir.Node) -> Linear:
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert node.name is not None and weight is not None and weight.name is not None
    return Linear(node.name, weight.name, None if bias is None else bias.name)
