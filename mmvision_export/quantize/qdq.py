"""The graph for TensorRT.

Float16, with QuantizeLinear and DequantizeLinear around the products that are quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.graph.passes import retype
from mmvision_export.quantize.formats import EightBitFormat, scale_from_magnitude
from mmvision_export.quantize.nodes import add_initializer, add_node
from mmvision_export.quantize.units import Unit, readers_of

__all__ = ["LOWEST_OPSET", "balance", "quantize_statically"]

Array = npt.NDArray[np.float32]
LOWEST_OPSET = 19  # the first whose QuantizeLinear takes float16 and makes float8


def balance(model: ir.Model, units: Sequence[Unit], divisors: Mapping[str, Array]) -> None:
    """Divide layer norms' outputs channel by channel, and multiply the weights that read them.

    The function stays.

    Args:
        model: Changed in place; weights are converted when they are read, one at a time.
        units: Those to balance, among others.
        divisors: By the units' inputs, `[in]` each.
    """
    weights = model.graph.initializers
    for unit in units:
        divisor = divisors.get(unit.input)
        if divisor is None or not unit.normed:
            continue
        normed = readers_of(model, unit)[0].inputs[0]
        norm = None if normed is None else normed.producer()
        assert norm is not None
        for value in norm.inputs[1:]:
            assert value is not None and value.name is not None
            _scale(weights[value.name], np.reciprocal(divisor))
        for linear in unit.linears:
            _scale(weights[linear.weight], divisor)


def _scale(value: ir.Value, factor: Array) -> None:
    tensor = value.const_value
    assert tensor is not None

    def scaled() -> ir.TensorProtocol:
        return ir.tensor((tensor.numpy() * factor).astype(np.float32))

    value.const_value = ir.LazyTensor(
        scaled, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )


def quantize_statically(
    model: ir.Model,
    units: Sequence[Unit],
    magnitudes: Mapping[str, float],
    kind: EightBitFormat,
    keep: Collection[str],
    dtype: ir.DataType = ir.DataType.FLOAT16,
) -> None:
    """Make the products of a float32 graph 8-bit, but for the units to keep, and all else float16.

    Weights have a scale for each output channel, the tensors they multiply one scale each. Biases,
    attention, layer norms and what is added to the residual stream stay float16.

    Args:
        model: Balanced; changed in place.
        units: All units.
        magnitudes: By the units' inputs: where they are cut off.
        kind: The format.
        keep: Names of units that stay float16.
        dtype: FLOAT16; FLOAT to see what quantising does by itself.

    Raises:
        ExportError: A weight is not finite in float16.
    """
    graph = model.graph
    exact = {
        linear.weight: graph.initializers[linear.weight].const_value
        for u in units
        for linear in u.linears
    }
    if dtype != ir.DataType.FLOAT:
        retype(model, dtype)
    zero = add_initializer(
        graph, f"{kind.name}_zero_point", ir.tensor(kind.quantized(np.zeros(()), np.ones(())))
    )
    for unit in units:
        if unit.name in keep:
            continue
        readers = readers_of(model, unit)
        value = readers[0].inputs[0]
        assert value is not None
        exact_scale = scale_from_magnitude(magnitudes[unit.input], kind.maximum)
        scale = add_initializer(
            graph, f"{unit.name}.input_scale", ir.tensor(exact_scale.astype(dtype.numpy()))
        )
        stored = add_node(
            readers[0], "QuantizeLinear", [value, scale, zero], f"{unit.name}.quantized", kind.dtype
        )
        read = add_node(
            readers[0], "DequantizeLinear", [stored, scale, zero], f"{unit.name}.dequantized", dtype
        )
        stored.shape = read.shape = value.shape
        for linear, node in zip(unit.linears, readers, strict=True):
            node.replace_input_with(0, read)
            node.replace_input_with(
                1, _quantized_weight(graph, node, linear.weight, exact[linear.weight], kind, dtype)
            )


def _quantized_weight(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    exact: ir.TensorProtocol | None,
    kind: EightBitFormat,
    dtype: ir.DataType,
) -> ir.Value:
    assert exact is not None
    scales = scale_from_magnitude(np.abs(exact.numpy()).max(axis=1), kind.maximum)  # [out]

    def convert() -> ir.TensorProtocol:
        return ir.tensor(kind.quantized(exact.numpy(), scales[:, None]))

    del graph.initializers[name]
    weight = add_initializer(
        graph,
        name,
        ir.LazyTensor(convert, dtype=kind.dtype, shape=ir.Shape(exact.shape.numpy()), name=name),
    )
    scale = add_initializer(graph, f"{name}_scale", ir.tensor(scales.astype(dtype.numpy())))
    zero = add_initializer(
        graph,
        f"{name}_zero_point",
        ir.tensor(kind.quantized(np.zeros(len(scales)), np.ones(len(scales)))),
    )
    read = add_node(
        node, "DequantizeLinear", [weight, scale, zero], f"{name}.dequantized", dtype, axis=0
    )
    read.shape = weight.shape
    return read
