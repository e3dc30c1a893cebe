"""What is quantised together: the products that read one tensor.

q, k and v read one layer norm's output. They share its quantised form, and either all of them are
quantised or none is: a runtime fuses them into one product only if they are of one type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir as ir

__all__ = ["Linear", "Unit", "readers_of", "share_of_operations", "units_of"]


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


def share_of_operations(
    model: ir.Model, units: Sequence[Unit], kept: Collection[str], *, patches_per_token: int
) -> float:
    """Share of the products' operations that are in 8 bit, 0 to 1.

    Args:
        model: The portable graph.
        units: All units of it.
        kept: Names of those in higher precision.
        patches_per_token: Of the encoder.
    """
    total = quantized = 0.0
    patches = model.graph.inputs[0].shape
    assert patches is not None
    for unit in units:
        for linear in unit.linears:
            weight = model.graph.initializers[linear.weight]
            (node,) = weight.consumers()
            rows = node.inputs[0]
            assert weight.const_value is not None and rows is not None and rows.shape is not None
            # A merger's products have a row for each image token, all others one for each patch.
            per_patch = 1.0 if str(rows.shape[0]) == str(patches[0]) else 1 / patches_per_token
            operations = per_patch * weight.const_value.size
            total += operations
            quantized += 0.0 if unit.name in kept else operations
    return quantized / total


def _linear(node: ir.Node) -> Linear:
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert node.name is not None and weight is not None and weight.name is not None
    return Linear(node.name, weight.name, None if bias is None else bias.name)
