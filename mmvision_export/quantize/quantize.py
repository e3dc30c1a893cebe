"""`mmvision quantize`.

From a float32 model directory to a quantised flavour that has passed its gate.

Units are ranked by what an error in each does to the output, on images that calibration has seen and on
others: what is cut off of a token that is larger than any in calibration counts in the ranking. The
fewest of the worst are then kept in the graph's own float type that let the result pass, measured end to
end on the same two kinds of images.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mmvision_export.artifacts.graph_variants import VNNI_GRAPH, variant_for_this_cpu
from mmvision_export.artifacts.manifest import CPU_GRAPH, DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.core.atomic import new_files, refuse_unwritable, sweep
from mmvision_export.core.errors import OutputError, QuantizationError
from mmvision_export.core.files import file_record
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.quantize.choices import CalibrationMethod, Flavour
from mmvision_export.quantize.dynamic import make_weights_signed
from mmvision_export.quantize.evidence import MARGIN, Checks
from mmvision_export.quantize.plan import Plan, plan_of
from mmvision_export.quantize.qdq import LOWEST_OPSET
from mmvision_export.quantize.ranking import Ranker, ranking_sample
from mmvision_export.quantize.report import QuantizationReport
from mmvision_export.quantize.search import MOST_EVALUATIONS, fewest_kept
from mmvision_export.quantize.statistics import Batch, grouped, outputs_of
from mmvision_export.quantize.units import share_of_operations, units_of

__all__ = ["QuantizationReport", "quantize", "refuse_unsuitable"]

Array = npt.NDArray[np.float32]


def quantize(
    directory: Path,
    manifest: Manifest,
    flavour: Flavour,
    *,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    method: CalibrationMethod = "minmax",
    min_cosine: float = PRECISIONS["int8"].gate.min_cosine,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Add a quantised flavour to a float32 model directory.

    Args:
        directory: The model directory.
        manifest: Its manifest; it then lists the new files, in memory and on disk.
        flavour: `int8` or `fp8` for TensorRT, `cpu-int8` for ONNX Runtime's CPU provider.
        calibration: Batches that ranges are measured on; the graph is checked on them too.
        held_out: Other batches, which ranges do not know. Units are chosen on both.
        method: How ranges are chosen from what is measured.
        min_cosine: Gate for every token, against the float32 graph. The graph has to stay away from
            it by `evidence.MARGIN`.
        force: Replace a flavour of that name.
        progress: Told about each step.

    Raises:
        ManifestError: Files of the directory are missing or not those of the manifest.
        OutputError: The flavour is there and may not be replaced, or it cannot be written.
        QuantizationError: It is not a float32 model; or the gate cannot be passed.
        BackendError: ONNX Runtime is not installed.
    """
    progress = progress or Progress()
    refuse_unsuitable(directory, manifest, flavour, min_cosine=min_cosine, force=force)
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
    plan = plan_of(source, basis, units, flavour, calibration, method, progress)
    name = flavour_graph(flavour)
    allowed = (1 - min_cosine) / MARGIN
    with new_files(directory, name=name) as new:
        trial, references = new / "trial", new / "references"
        references.mkdir()
        checks = Checks(held_out, calibration, references)
        checks.refer_to(source, progress)
        sample = ranking_sample(_in_turns(calibration, held_out), manifest.config)
        graphs = _Graphs(plan, checks, sample, new, trial, allowed, progress)
        none_kept = graphs.loss(frozenset())
        names = [unit.name for unit in units]
        errors = dict.fromkeys(names, 0.0)
        kept: frozenset[str] | None = frozenset()
        if none_kept > allowed:
            ranker = Ranker(plan, sample)
            ranking = ranker(graphs.sample_results, progress)
            lost = ranking.losses(np.ones(len(units), bool)).max(axis=0)
            errors = dict(zip(names, lost.tolist(), strict=True))
            kept = fewest_kept(
                graphs.loss,
                lambda: ranker(graphs.sample_results, progress),
                names,
                ranking,
                allowed=allowed,
            )
        if kept is None or len(kept) == len(units):
            raise QuantizationError(
                f"no unit can be {flavour}: every token needs a cosine of {1 - allowed:.8g}, the "
                f"gate {min_cosine} with its margin, and the best graph reached "
                f"{1 - min(graphs.losses):.6f}",
                hint="lower --min-cosine",
            )
        shutil.rmtree(references)
        shutil.rmtree(trial)
        records = {path.name: file_record(path) for path in new.iterdir()}
        if name in manifest.files:
            # Before a file moves: a process that is killed then leaves no flavour, rather than the
            # record of one beside the files of another.
            manifest.withdraw(directory, list(records))
    report = QuantizationReport(
        flavour=flavour,
        source=basis.name,
        calibration_method="none" if flavour == "cpu-int8" else method,
        min_cosine=min_cosine,
        margin=MARGIN,
        reached=1 - graphs.loss_of_best,
        without_fallback=max(-1.0, 1 - none_kept),
        held_out=sum(len(grid) for _, grid in held_out),
        calibration=sum(len(grid) for _, grid in calibration),
        evaluations=len(graphs.losses),
        operations=share_of_operations(
            load_graph(source),
            units,
            kept,
            patches_per_token=manifest.config.patches_per_token,
        ),
        size_bytes=_weight_bytes(plan.model(kept)),
        float_size_bytes=_weight_bytes(load_graph(source)),
        balanced=[unit.name for unit in units if unit.input in plan.divisors],
        quantized={unit.name: errors[unit.name] for unit in units if unit.name not in kept},
        kept={each: errors[each] for each in sorted(kept, key=lambda each: -errors[each])},
    )
    manifest.update(directory, files=records, quantization={name: report.to_dict()})
    return report


def refuse_unsuitable(
    directory: Path, manifest: Manifest, flavour: Flavour, *, min_cosine: float, force: bool
) -> None:
    """Refuse before the work what could not be done after it.

    Raises:
        OutputError: The flavour is there and may not be replaced.
        QuantizationError: The gate is no cosine, or the model is not one to start from.
    """
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
    if flavour_graph(flavour) in manifest.files and not force:
        raise OutputError(
            f"{directory / flavour_graph(flavour)} already exists",
            hint="replace it with --force",
            reason="exists",
        )


class _Graphs:
    """Writes one graph after the other, and keeps the files of the one that passed with the fewest units kept.

    Attributes:
        losses: Of the graphs that were measured, one after the other.
        loss_of_best: Of the one whose files are kept.
        sample_results: If the last one failed, its embeddings of each batch of the sample.
    """

    def __init__(
        self,
        plan: Plan,
        checks: Checks,
        sample: Sequence[Batch],
        new: Path,
        trial: Path,
        allowed: float,
        progress: Progress,
    ) -> None:
        self.losses: list[float] = []
        self.loss_of_best = math.inf
        self.sample_results: list[Array] = []
        self._batches = checks.batches
        self._worst_first = list(self._batches)
        self._plan = plan
        self._checks = checks
        self._sample = sample
        self._new = new
        self._trial = trial
        self._allowed = allowed
        self._progress = progress

    def loss(self, keep: frozenset[str]) -> float:
        """The most that a token's cosine is below 1 with these units kept."""
        plan, total = self._plan, len(self._plan.units)
        self._progress.step(
            f"graph {len(self.losses) + 1} of at most {MOST_EVALUATIONS}: {len(keep)} of {total} units "
            "in higher precision",
            total=len(self._batches),
        )
        shutil.rmtree(self._trial, ignore_errors=True)
        self._trial.mkdir()
        _write(plan, keep, self._trial)
        gc.collect()  # see `Ranker`
        loss = self._measured()
        self.losses.append(loss)
        if loss <= self._allowed:  # with fewer units kept than any before: no others are asked for
            self.loss_of_best = loss
            for file in self._trial.iterdir():
                file.replace(self._new / file.name)
        return loss

    def _measured(self) -> float:
        """The largest loss in the graph that was written last, up to the first batch that fails.

        The batches on which the graph before lost the most come first. If one fails, the sample is
        run too.
        """
        found: dict[str, float] = {}

        def wanted() -> Iterator[Batch]:
            for name in self._worst_first:
                yield self._batches[name]
                if found[name] > self._allowed:
                    yield from self._sample
                    return

        with self._runnable() as graph:
            results = outputs_of(graph, wanted(), weights_in=graph.parent, dtype=self._plan.dtype)
            for name in self._worst_first:
                found[name] = float(self._checks.losses(name, next(results)).max())
                self._progress.advance()
                if found[name] > self._allowed:
                    self._progress.step("running what units are ranked on", total=len(self._sample))
                    self.sample_results = []
                    for result in results:
                        self.sample_results.append(result)
                        self._progress.advance()
                    break
        self._worst_first.sort(key=lambda name: -found.get(name, 0.0))
        return max(found.values())

    @contextlib.contextmanager
    def _runnable(self) -> Iterator[Path]:
        """The graph in its trial folder, with all its weights for the block.

        Of `cpu-int8` the one that this CPU would run: both compute the same integers.
        """
        data = self._trial / DATA
        # Weights that a flavour shares lie one folder up, where it will be itself. onnx-ir, which reads
        # the source between two trials, reads no file that has two names.
        if self._plan.flavour == "cpu-int8":
            _link(self._plan.source.parent / DATA, data)
        try:
            written = {path.name for path in self._trial.iterdir()}
            yield self._trial / variant_for_this_cpu(flavour_graph(self._plan.flavour), written)
        finally:
            data.unlink(missing_ok=True)


def _in_turns(one: Sequence[Batch], other: Sequence[Batch]) -> list[Batch]:
    pairs = itertools.zip_longest(one, other)
    return [batch for pair in pairs for batch in pair if batch is not None]


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, name)


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _write(plan: Plan, keep: frozenset[str], folder: Path) -> None:
    model, name = plan.model(keep), flavour_graph(plan.flavour)
    if plan.flavour == "cpu-int8":
        _save_beside(model, folder, name)
        make_weights_signed(model)
        ir.save(model, folder / VNNI_GRAPH)
    else:
        ir.save(model, folder / name, external_data=f"{name}.data", alignment=4096)
        onnx.checker.check_model(folder / name)


def _save_beside(model: ir.Model, folder: Path, name: str) -> None:
    """Write a graph whose new weights go into a file of its own; others stay."""
    values = [
        v
        for v in model.graph.initializers.values()
        if not isinstance(v.const_value, ir.ExternalTensor)
    ]
    large = [v for v in values if v.const_value is not None and v.const_value.nbytes > 256]
    tensors = [value.const_value for value in large if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(
        tensors, folder, f"{name}.data", alignment=4096
    )
    for value, tensor in zip(large, external, strict=True):
        value.const_value = tensor
    ir.save(model, folder / name)
