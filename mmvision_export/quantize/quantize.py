"""`mmvision quantize`.

From a float32 model directory to a quantised flavour that has passed its gate.

Units are ranked by what quantising each alone does to the output. The fewest of the worst are then
kept in the graph's own float type that let the result pass, measured end to end on batches that
calibration has not seen.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mmvision_export.artifacts.manifest import CPU_GRAPH, DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.core.atomic import new_files, refuse_unwritable, sweep
from mmvision_export.core.errors import QuantizationError
from mmvision_export.core.files import file_record
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.quantize.balancing import divisor_of, static_rounding, token_rounding
from mmvision_export.quantize.choices import CalibrationMethod, Flavour
from mmvision_export.quantize.dynamic import quantize_dynamically
from mmvision_export.quantize.formats import FP8, INT8
from mmvision_export.quantize.qdq import LOWEST_OPSET, balance, quantize_statically
from mmvision_export.quantize.statistics import (
    Batch,
    grouped,
    magnitudes,
    run,
    samples,
)
from mmvision_export.quantize.units import Unit, units_of

__all__ = ["QuantizationReport", "quantize"]

Array = npt.NDArray[np.float32]

RANKING_PATCHES = 1024


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What was done, for the manifest.

    Attributes:
        flavour: int8, fp8 or cpu-int8.
        source: The graph it was made from, by file name; its attention is the flavour's.
        calibration_method: minmax, percentile or entropy; for cpu-int8 `none`, since it measures
            while it runs.
        min_cosine: The gate.
        reached: Smallest cosine of a token with the float32 graph's, on the held-out batches.
        without_fallback: The same with every unit quantised.
        balanced: Units whose layer norm was balanced.
        quantized: Of each quantised unit, the smallest cosine of a calibration token with that unit
            alone quantised.
        kept: The same of each unit that stayed in higher precision, worst first.
    """

    flavour: str
    source: str
    calibration_method: str
    min_cosine: float
    reached: float
    without_fallback: float
    balanced: list[str]
    quantized: dict[str, float]
    kept: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def quantize(
    directory: Path,
    manifest: Manifest,
    flavour: Flavour,
    *,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    method: CalibrationMethod = "minmax",
    min_cosine: float = PRECISIONS["int8"].gate.min_cosine,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Add a quantised flavour to a float32 model directory.

    Args:
        directory: The model directory.
        manifest: Its manifest; it then lists the new files, in memory and on disk.
        flavour: `int8` or `fp8` for TensorRT, `cpu-int8` for ONNX Runtime's CPU provider.
        calibration: Batches that ranges are measured on.
        held_out: Other batches, that the gate is measured on.
        method: How ranges are chosen from what is measured.
        min_cosine: Gate for every token, against the float32 graph.
        progress: Told about each step.

    Raises:
        ManifestError: Files of the directory are missing or not those of the manifest.
        QuantizationError: It is not a float32 model; or the gate cannot be passed.
        BackendError: ONNX Runtime is not installed.
    """
    progress = progress or Progress()
    if not 0 < min_cosine < 1:
        raise QuantizationError(f"the minimum cosine must be between 0 and 1, got {min_cosine}")
    if manifest.precision != "fp32":
        raise QuantizationError(
            f"{directory} is a {manifest.precision} model; quantisation starts from float32",
            hint="export it again with --fp32",
        )
    if flavour != "cpu-int8" and manifest.opset < LOWEST_OPSET:
        raise QuantizationError(
            f"quantisation needs a graph of opset {LOWEST_OPSET} or later, this one has {manifest.opset}",
            hint=f"export it again with --opset {LOWEST_OPSET} or higher",
        )
    # A killed run leaves a second name of the weights, and onnx-ir reads no file that has two.
    sweep(directory)
    refuse_unwritable(directory)
    progress.step("verifying the graph's files")
    manifest.verify(directory, (GRAPH, DATA))
    source = directory / GRAPH
    basis = source
    if flavour == "cpu-int8" and CPU_GRAPH in manifest.files:
        manifest.verify(directory, (CPU_GRAPH,))
        basis = directory / CPU_GRAPH
    calibration = grouped(calibration, manifest.config)
    held_out = grouped(held_out, manifest.config)
    units = units_of(load_graph(source))
    plan = _plan(source, basis, units, flavour, calibration, method, progress)
    reference = np.concatenate(run(source, held_out, weights_in=directory, dtype=np.float32))
    order = sorted(units, key=lambda unit: plan.cosines[unit.name])

    with new_files(directory, name=flavour_graph(flavour)) as new:

        def written(kept: int) -> _Written:
            """The graph that keeps the worst units; it stays in the folder."""
            progress.step(f"{flavour} with {kept} of {len(units)} units in higher precision")
            _write(basis, new, flavour, units, plan, {unit.name for unit in order[:kept]})
            # Weights that a flavour shares lie one folder up, where it will be itself.
            if flavour == "cpu-int8":
                _link(directory / DATA, new / DATA)
            try:
                dtype = np.float32 if flavour == "cpu-int8" else np.float16
                result = np.concatenate(
                    run(new / flavour_graph(flavour), held_out, weights_in=new, dtype=dtype)
                )
            finally:
                (new / DATA).unlink(missing_ok=True)
            return _Written(kept, _min_cosine(result, reference))

        first = written(0)
        best = first
        if not first.passes(min_cosine):
            best = _fewest(written, len(units), min_cosine)
        if not best.passes(min_cosine):
            raise QuantizationError(
                f"the {flavour} graph even with every unit in higher precision has a token of cosine "
                f"{best.cosine:.6f}, below {min_cosine}",
                hint="lower --min-cosine",
            )
        if best.kept == len(units):
            raise QuantizationError(
                f"no unit can be {flavour} with every token's cosine at least {min_cosine}",
                hint="lower --min-cosine",
            )
        records = {path.name: file_record(path) for path in new.iterdir()}
    report = QuantizationReport(
        flavour=flavour,
        source=basis.name,
        calibration_method="none" if flavour == "cpu-int8" else method,
        min_cosine=min_cosine,
        reached=best.cosine,
        without_fallback=first.cosine,
        balanced=[unit.name for unit in units if unit.input in plan.divisors],
        quantized={
            unit.name: plan.cosines[unit.name] for unit in units if unit not in order[: best.kept]
        },
        kept={unit.name: plan.cosines[unit.name] for unit in order[: best.kept]},
    )
    manifest.update(
        directory, files=records, quantization={flavour_graph(flavour): report.to_dict()}
    )
    return report


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, name)


@dataclasses.dataclass(frozen=True)
class _Written:
    kept: int  # units in higher precision, the worst
    cosine: float  # smallest of a held-out token; -1 where a value is not finite

    def passes(self, gate: float) -> bool:
        """Whether the cosine is large enough."""
        return self.cosine >= gate


def _fewest(written: Callable[[int], _Written], most: int, gate: float) -> _Written:
    """The graph with the fewest units kept that passes, by doubling and then halving.

    It is the one left written.

    If none passes, the one that keeps all.
    """
    failed, best = 0, written(1)
    while not best.passes(gate) and best.kept < most:
        failed, best = best.kept, written(min(2 * best.kept, most))
    if not best.passes(gate):
        return best
    last = best
    while best.kept - failed > 1:
        last = written((failed + best.kept) // 2)
        if last.passes(gate):
            best = last
        else:
            failed = last.kept
    if last != best:
        written(best.kept)
    return best


@dataclasses.dataclass(frozen=True)
class _Plan:
    divisors: dict[str, Array]  # by a unit's input, [in]
    magnitudes: dict[str, float]  # by a unit's input
    cosines: dict[str, float]  # by a unit's name, see QuantizationReport.quantized


def _plan(
    source: Path,
    basis: Path,
    units: Sequence[Unit],
    flavour: Flavour,
    batches: Sequence[Batch],
    method: CalibrationMethod,
    progress: Progress,
) -> _Plan:
    kind = FP8 if flavour == "fp8" else INT8
    is_dynamic = flavour == "cpu-int8"
    rounding_for = token_rounding if is_dynamic else static_rounding
    found = samples(source, [unit.input for unit in units], batches, progress)
    initializers = load_graph(source).graph.initializers

    def weights(unit: Unit) -> dict[str, Array]:
        tensors = {
            linear.weight: initializers[linear.weight].const_value for linear in unit.linears
        }
        return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}

    progress.step("balancing", total=len(units))
    divisors = {}
    for unit in units:
        divisor = divisor_of(unit, found[unit.input], weights(unit), kind, rounding_for)
        if divisor is not None:
            divisors[unit.input] = divisor
        progress.advance()
    ranges = {} if is_dynamic else magnitudes(source, found, divisors, batches, method, progress)
    plan = _Plan(divisors, ranges, {})
    few = _few(batches)
    reference = np.concatenate(run(source, few, weights_in=source.parent, dtype=np.float32))
    progress.step("ranking units", total=len(units))
    for unit in units:
        model = _quantized(
            basis,
            flavour,
            units,
            plan,
            {other.name for other in units} - {unit.name},
            ir.DataType.FLOAT,
        )
        content = ir.serde.serialize_model(model).SerializeToString()
        result = np.concatenate(run(content, few, weights_in=source.parent, dtype=np.float32))
        plan.cosines[unit.name] = _min_cosine(result, reference)
        progress.advance()
    return plan


def _few(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, until there are enough patches to rank on."""
    sizes = np.cumsum([len(pixels) for pixels, _ in batches])
    return list(batches[: 1 + int(np.searchsorted(sizes, RANKING_PATCHES))])


def _min_cosine(result: Array, reference: Array) -> float:
    distance = metrics(result, reference)
    return -1.0 if distance.non_finite else distance.min_cosine


def _quantized(
    basis: Path,
    flavour: Flavour,
    units: Sequence[Unit],
    plan: _Plan,
    keep: set[str],
    dtype: ir.DataType,
) -> ir.Model:
    model = load_graph(basis)
    # A CPU flavour's operators are products by other names, but for the one that is a product and
    # an activation.
    InlinePass(lambda function: function.name == "LinearGelu")(model)
    # What is kept is kept as it was, so that a CPU flavour can share it.
    balance(model, [unit for unit in units if unit.name not in keep], plan.divisors)
    if flavour == "cpu-int8":
        quantize_dynamically(model, units, keep)
    else:
        quantize_statically(
            model, units, plan.magnitudes, FP8 if flavour == "fp8" else INT8, keep, dtype
        )
    return model


def _write(
    basis: Path, new: Path, flavour: Flavour, units: Sequence[Unit], plan: _Plan, keep: set[str]
) -> None:
    model = _quantized(basis, flavour, units, plan, keep, ir.DataType.FLOAT16)
    if flavour == "cpu-int8":
        _save_beside(model, new, flavour_graph(flavour))
    else:
        ir.save(
            model,
            new / flavour_graph(flavour),
            external_data=f"{flavour_graph(flavour)}.data",
            alignment=4096,
        )
        onnx.checker.check_model(new / flavour_graph(flavour))


def _save_beside(model: ir.Model, new: Path, name: str) -> None:
    """Write a graph whose new weights go into a file of its own; others stay."""
    values = [
        v
        for v in model.graph.initializers.values()
        if not isinstance(v.const_value, ir.ExternalTensor)
    ]
    large = [v for v in values if v.const_value is not None and v.const_value.nbytes > 256]
    tensors = [value.const_value for value in large if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(
        tensors, new, f"{name}.data", alignment=4096
    )
    for value, tensor in zip(large, external, strict=True):
        value.const_value = tensor
    ir.save(model, new / name)
