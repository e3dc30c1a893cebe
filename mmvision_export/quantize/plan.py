"""What is done to each unit that is quantised, and the graph that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.quantize.balancing import (
    Rounding,
    divisor_of,
    static_rounding,
    token_rounding,
)
from mmvision_export.quantize.choices import CalibrationMethod, Flavour
from mmvision_export.quantize.dynamic import quantize_dynamically
from mmvision_export.quantize.formats import FP8, INT8, EightBitFormat
from mmvision_export.quantize.qdq import balance, quantize_statically
from mmvision_export.quantize.statistics import Batch, magnitudes, samples
from mmvision_export.quantize.units import Unit

__all__ = ["Plan", "plan_of", "weights_of"]

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each unit is quantised, if it is.

    Attributes:
        source: The portable float32 graph, which everything is measured on.
        basis: The float32 graph that the flavour is made from.
        flavour: int8, fp8 or cpu-int8.
        units: All units, in the graph's order.
        divisors: By a unit's input: what each channel is divided by, `[in]`.
        magnitudes: By a unit's input: where it is cut off; empty for cpu-int8, which measures while
            it runs.
    """

    source: Path
    basis: Path
    flavour: Flavour
    units: tuple[Unit, ...]
    divisors: Mapping[str, Array]
    magnitudes: Mapping[str, float]

    @property
    def kind(self) -> EightBitFormat:
        """The 8-bit format."""
        return FP8 if self.flavour == "fp8" else INT8

    @property
    def dtype(self) -> type[np.floating]:
        """Of the graph's inputs, and of what is not quantised."""
        return np.float32 if self.flavour == "cpu-int8" else np.float16

    def rounding(self, unit: Unit) -> Rounding:
        """What the runtime makes of the rows that a unit reads, once they have been divided."""
        if self.flavour == "cpu-int8":
            return token_rounding(self.kind, 0.0)
        return static_rounding(self.kind, self.magnitudes[unit.input])

    def model(self, keep: Collection[str]) -> ir.Model:
        """The flavour's graph, its weights computed when they are written.

        Args:
            keep: Names of the units that stay in the graph's float type.
        """
        model = load_graph(self.basis)
        # A CPU flavour's operators are products by other names, but for the one that is a product
        # and an activation.
        InlinePass(lambda function: function.name == "LinearGelu")(model)
        # What is kept is kept as it was, so that a CPU flavour can share it.
        balance(model, [unit for unit in self.units if unit.name not in keep], self.divisors)
        if self.flavour == "cpu-int8":
            quantize_dynamically(model, self.units, keep)
        else:
            quantize_statically(model, self.units, self.magnitudes, self.kind, keep)
        return model


def plan_of(
    source: Path,
    basis: Path,
    units: Sequence[Unit],
    flavour: Flavour,
    batches: Sequence[Batch],
    method: CalibrationMethod,
    progress: Progress,
) -> Plan:
    """Measure and balance on calibration batches.

    Args:
        source: See `Plan`.
        basis: See `Plan`.
        units: All units of the source.
        flavour: See `Plan`.
        batches: What is measured on, see `statistics.grouped`.
        method: How ranges are chosen.
        progress: Told about each step.

    Raises:
        QuantizationError: A tensor is not finite.
    """
    kind = FP8 if flavour == "fp8" else INT8
    is_dynamic = flavour == "cpu-int8"
    rounding_for = token_rounding if is_dynamic else static_rounding
    found = samples(source, [unit.input for unit in units], batches, progress)
    model = load_graph(source)
    progress.step("balancing", total=len(units))
    divisors = {}
    for unit in units:
        divisor = divisor_of(unit, found[unit.input], weights_of(model, unit), kind, rounding_for)
        if divisor is not None:
            divisors[unit.input] = divisor
        progress.advance()
    ranges = {} if is_dynamic else magnitudes(source, found, divisors, batches, method, progress)
    return Plan(source, basis, flavour, tuple(units), divisors, ranges)


def weights_of(model: ir.Model, unit: Unit) -> dict[str, Array]:
    """A unit's weights `[out, in]`, by their names."""
    tensors = {
        linear.weight: model.graph.initializers[linear.weight].const_value
        for linear in unit.linears
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
