"""Is the exported graph the same function as the PyTorch encoder? Measured with Polygraphy, for each grid.

Every result is compared with the encoder in float64. The runners: PyTorch in the graph's precision, which shows what
that precision costs by itself; ONNX Runtime on each graph of the model directory; and, where there is a GPU, the
engines that fit it.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults

from mmvision_export.backends import open_backend
from mmvision_export.backends.onnxruntime import create_session
from mmvision_export.compute_capability import current_compute_capability
from mmvision_export.encoder import VisionEncoderModule
from mmvision_export.errors import BackendError, ManifestError, ParityError
from mmvision_export.manifest import CPU_GRAPH, GRAPH, PLANS, Manifest
from mmvision_export.metrics import Metrics, metrics
from mmvision_export.onnx_files import FP16_GRAPH, FP16_MIN_COSINE
from mmvision_export.polygraphy_setup import captured_messages
from mmvision_export.progress import Progress
from mmvision_export.runners import EngineRunner, TorchRunner, accepts
from mmvision_export.sample_batches import PARITY_GRIDS, Grid, sample_batch
from mmvision_export.sidecar import EngineRecord
from mmvision_export.weights import DTYPES, WeightSource

__all__ = ["GATES", "Gate", "ParityResult", "ParityRow", "check_parity", "record_parity"]

REFERENCE = "pytorch-fp64"
Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What a graph must reach on every grid, against PyTorch in float64.

    Attributes:
        max_relative_l2: Largest relative L2 difference, or None.
        min_cosine: Smallest cosine similarity of any token.
        times_eager: Largest relative L2 difference as a multiple of eager PyTorch's in the same precision, or None.
    """

    max_relative_l2: float | None
    min_cosine: float
    times_eager: float | None

    def describe(self) -> str:
        """The gate in words."""
        parts = [f"minimum cosine >= {self.min_cosine}"]
        if self.max_relative_l2 is not None:
            parts.append(f"relative L2 <= {self.max_relative_l2:.0e}")
        if self.times_eager is not None:
            parts.append(f"relative L2 <= {self.times_eager:g} x eager PyTorch's in the same precision")
        return ", ".join(parts)

    def failures(self, result: Metrics, eager: Metrics | None) -> list[str]:
        """Why a result does not pass; nothing if it does."""
        if result.non_finite:
            return [f"{result.non_finite} values are not finite"]
        found = []
        # Written so that NaN fails.
        if self.max_relative_l2 is not None and not result.relative_l2 <= self.max_relative_l2:
            found.append(f"relative L2 {result.relative_l2:.2e} > {self.max_relative_l2:.0e}")
        if not result.min_cosine >= self.min_cosine:
            found.append(f"minimum cosine {result.min_cosine:.6f} < {self.min_cosine}")
        if self.times_eager is not None and eager is not None:
            limit = self.times_eager * eager.relative_l2
            if not result.relative_l2 <= limit:
                found.append(f"relative L2 {result.relative_l2:.2e} > {self.times_eager:g} x PyTorch's {limit:.2e}")
        return found


GATES: dict[str, Gate] = {
    # Rounding of float32 (6e-8) accumulated over the depth measures about 1e-6; a wrong formula measures above 1e-3.
    "fp32": Gate(max_relative_l2=1e-5, min_cosine=0.999999, times_eager=None),
    "fp16": Gate(max_relative_l2=None, min_cosine=FP16_MIN_COSINE, times_eager=2.0),
    "bf16": Gate(max_relative_l2=None, min_cosine=0.99, times_eager=2.0),
}
"""By precision."""


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One result on one grid.

    Attributes:
        runner: What was compared with PyTorch in float64.
        precision: fp32, fp16 or bf16.
        grid: Name of the grid.
        patches: Patches in the batch.
        metrics: The distance.
        failures: Gates it did not pass; PyTorch itself has none.
    """

    runner: str
    precision: str
    grid: str
    patches: int
    metrics: Metrics
    failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "metrics": self.metrics.to_dict()}


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """All rows, and whether all pass."""

    rows: list[ParityRow]

    @property
    def passed(self) -> bool:
        """Whether no row failed a gate."""
        return not any(row.failures for row in self.rows)


def check_parity(
    directory: Path,
    *,
    source: WeightSource | None = None,
    grids: Mapping[str, Grid] = PARITY_GRIDS,
    progress: Progress | None = None,
) -> ParityResult:
    """Compare every graph of a model directory, and the engines that fit this machine, with PyTorch in float64.

    Args:
        directory: The model directory.
        source: Where to load the weights from; the manifest's own source if None.
        grids: Batches to compare on.
        progress: Told about each step.

    Raises:
        ManifestError: The model directory is not one, or damaged.
        CheckpointError: The weights cannot be loaded again, or are not those that were exported.
        ParityError: Nothing can be compared on this machine.
        BackendError: ONNX Runtime is not installed.
    """
    progress = progress or Progress()
    manifest = Manifest.read(directory)
    config = manifest.config
    weights = source or WeightSource.from_manifest(manifest.source, config)
    graphs = {GRAPH: manifest.precision}
    if CPU_GRAPH in manifest.files:
        graphs[CPU_GRAPH] = manifest.precision
    if FP16_GRAPH in manifest.files:
        graphs[FP16_GRAPH] = "fp16"
    manifest.verify(directory, [*graphs, *(file for file in manifest.files if file.endswith(".data"))])

    def load(dtype: torch.dtype, *, upcast: bool = False) -> Callable[[], VisionEncoderModule]:
        def encoder() -> VisionEncoderModule:
            loaded = weights.load(dtype)
            _refuse_other_weights(manifest, loaded.source)
            return loaded.encoder.double() if upcast else loaded.encoder

        return encoder

    precisions = sorted(set(graphs.values()), reverse=True)
    runners: list[BaseRunner] = [TorchRunner(REFERENCE, load(torch.float32, upcast=True), config)]
    candidates: dict[str, str] = {}
    for precision in precisions:
        name = f"pytorch-{precision}"
        candidates[name] = precision
        runners.append(TorchRunner(name, load(DTYPES[precision]), config))
    for graph, precision in graphs.items():
        if precision == "bf16":
            progress.note(
                f"{graph} is bf16, which ONNX Runtime's CPU provider cannot run: only engines can be compared"
            )
            continue
        candidates[graph] = precision
        runners.append(OnnxrtRunner(_session_loader(directory / graph), name=graph))
    for engine, record in _engines_for_this_machine(directory, progress):
        name = f"{PLANS}/{engine.name}"
        candidates[name] = record.precision
        runners.append(EngineRunner(name, engine, record))
    if set(candidates) == {f"pytorch-{precision}" for precision in precisions}:
        raise ParityError(f"nothing in {directory} can be run on this machine", hint="see: mmvision doctor")

    batches = {name: sample_batch(grid, config, seed=0) for name, grid in grids.items()}
    distances = _distances(runners, batches, progress)

    rows = []
    for runner, precision in candidates.items():
        eager = distances.get(f"pytorch-{precision}", {})
        for grid, distance in distances.get(runner, {}).items():
            is_torch = runner.startswith("pytorch-")
            failures = [] if is_torch else GATES[precision].failures(distance, eager.get(grid))
            rows.append(ParityRow(runner, precision, grid, len(batches[grid][0]), distance, failures))
    return ParityResult(rows)


def _session_loader(graph: Path) -> Callable[[], Any]:
    return lambda: create_session(graph, provider="CPUExecutionProvider")


def _distances(
    runners: list[BaseRunner], batches: Mapping[str, Batch], progress: Progress
) -> dict[str, dict[str, Metrics]]:
    """Runner -> grid -> distance from the first runner. Polygraphy runs them, each loaded only while it runs."""
    from polygraphy.exception import PolygraphyException

    class Feeds(list):  # type: ignore[type-arg]
        """The batches, counted as the runner takes them."""

        def __iter__(self) -> Any:
            for feed in super().__iter__():
                yield feed
                progress.advance()

    found: dict[str, dict[str, Metrics]] = {}

    def run(runner: BaseRunner) -> tuple[list[str], RunResults]:
        names = [name for name, (pixels, grid) in batches.items() if accepts(runner, len(pixels), len(grid))]
        for name in [name for name in batches if name not in names]:
            progress.note(f"{runner.name} does not take {name}, which is beyond its profile")
        progress.step(f"running {runner.name}", total=len(names))
        feeds = Feeds(OrderedDict(pixel_values=batches[name][0], grid_thw=batches[name][1]) for name in names)
        return names, Comparator.run([runner], data_loader=feeds)

    with captured_messages() as messages:
        try:
            every, (reference, *_) = run(runners[0])
            by_grid = dict(zip(every, reference[1], strict=True))
            for runner in runners[1:]:
                names, results = run(runner)
                if not names:
                    continue
                wanted = RunResults([(REFERENCE, [by_grid[name] for name in names]), *results])
                (comparison,) = Comparator.compare_accuracy(wanted, comparisons=[(0, 1)], compare_func=_compare)
                rows = comparison[REFERENCE, runner.name]
                found[runner.name] = {n: row["image_embeds"].metrics for n, row in zip(names, rows, strict=True)}
        except PolygraphyException as error:
            raise ParityError("\n  ".join(dict.fromkeys([*messages, str(error)]))) from error
    return found


@dataclasses.dataclass
class _Compared:
    """What Polygraphy keeps of a comparison. It never fails by itself: the gates need PyTorch's own figures too."""

    metrics: Metrics

    def __bool__(self) -> bool:
        return True


def _compare(reference: Any, result: Any) -> OrderedDict[str, _Compared]:
    return OrderedDict(image_embeds=_Compared(metrics(result["image_embeds"], reference["image_embeds"])))


def _engines_for_this_machine(directory: Path, progress: Progress) -> list[tuple[Path, EngineRecord]]:
    if current_compute_capability() is None:
        return []
    found = []
    for engine in sorted((directory / PLANS).glob("*.engine")):
        try:
            record = EngineRecord.read(engine)
            open_backend(record.backend, engine, device=0, threads=None).close()
        except (BackendError, ManifestError) as error:
            progress.note(f"{engine.name} is not compared: {error}")
            continue
        found.append((engine, record))
    return found


def _refuse_other_weights(manifest: Manifest, source: Mapping[str, Any]) -> None:
    exported, loaded = manifest.source.get("sha256"), source.get("sha256")
    if exported and loaded and exported != loaded:
        raise ParityError(
            f"the weights have sha256 {loaded}, those that were exported had {exported}",
            hint="name the checkpoint that was exported with --checkpoint, or export again",
        )


def record_parity(directory: Path, result: ParityResult) -> None:
    """Write a result into the manifest, under the name of each graph or engine.

    Raises:
        ManifestError: The manifest is missing or malformed.
        OutputError: It cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    parity: dict[str, Any] = {}
    for runner in dict.fromkeys(row.runner for row in result.rows if not row.runner.startswith("pytorch-")):
        rows = [row for row in result.rows if row.runner == runner]
        parity[runner] = {
            "reference": REFERENCE,
            "date": now,
            "passed": not any(row.failures for row in rows),
            "grids": {
                row.grid: {**row.metrics.to_dict(), "patches": row.patches, "failures": row.failures} for row in rows
            },
        }
    Manifest.read(directory).update(directory, parity=parity)
