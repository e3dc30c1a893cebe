"""Is the exported graph the same function as the PyTorch encoder? Measured with Polygraphy, for each input.

Every result is compared with the encoder in float64. The runners: PyTorch in the graph's precision, which shows what
that precision costs by itself; ONNX Runtime on each graph of the model directory; each float16 and bfloat16 graph once
more with every intermediate result rounded to its type, as a GPU rounds it; and, where there is a GPU, the engines that
fit it. On the input where they are furthest off, the graphs are then compared layer by layer.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, RunResults

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import (
    CPU_GRAPH,
    OPENVINO_GRAPH,
    PLANS,
    Manifest,
    model_directory_of,
)
from mmvision_export.core.errors import BackendError, ManifestError, ParityError
from mmvision_export.core.metrics import Metrics, metrics, token_errors
from mmvision_export.core.progress import Progress
from mmvision_export.engine.polygraphy_setup import captured_messages
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.parity.float64 import Float64Encoder
from mmvision_export.parity.gates import GATES
from mmvision_export.parity.layers import LayerComparison, compare_layers
from mmvision_export.parity.magnitudes import overflow_warnings
from mmvision_export.parity.rounded import rounded_model
from mmvision_export.parity.runners import BackendRunner, EngineRunner, TorchRunner, accepts
from mmvision_export.parity.samples import Sample, samples_from_grids
from mmvision_export.parity.sessions import session_from_model
from mmvision_export.parity.stages import GraphFacts, facts_of_graph
from mmvision_export.runtime.backends import BackendOptions, open_backend
from mmvision_export.runtime.backends.cpu_kernels import find_cpu_kernels
from mmvision_export.runtime.backends.cuda import current_compute_capability
from mmvision_export.runtime.backends.onnxruntime import create_session
from mmvision_export.runtime.backends.openvino import import_openvino

__all__ = ["ParityResult", "ParityRow", "check_parity", "record_parity"]

REFERENCE = "pytorch-fp64"
_EAGER = "pytorch-{}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to compare with PyTorch in float64.

    Attributes:
        subject: File name of the graph or engine, relative to the model directory; of PyTorch itself None.
        precision: Key of the gate table.
        float_type: fp32, fp16 or bf16: the type of the hidden states.
        runner: Runs it; its name says what and how.
    """

    subject: str | None
    precision: str
    float_type: str
    runner: BaseRunner


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One result on one sample.

    Attributes:
        runner: What was compared with PyTorch in float64, and how it was run.
        subject: The graph or engine; None for PyTorch itself, which has no failures.
        precision: Key of the gate table.
        sample: Name of the sample.
        patches: Patches in the batch.
        metrics: The distance.
        limit: Largest relative L2 difference that the gate allows here, or None.
        failures: Gates it did not pass.
        token_errors: Relative L2 difference of each image token.
    """

    runner: str
    subject: str | None
    precision: str
    sample: str
    patches: int
    metrics: Metrics
    limit: float | None
    failures: list[str]
    token_errors: npt.NDArray[np.float64] = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the tokens left out."""
        fields = {name: value for name, value in vars(self).items() if name != "token_errors"}
        return {**fields, "metrics": self.metrics.to_dict()}


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """All there is to say about a model directory's accuracy.

    Attributes:
        directory: The model directory.
        manifest: Its manifest.
        samples: What was compared on.
        rows: Result by runner and sample.
        layers: The graphs stage by stage, on the sample where a graph is furthest off.
        warnings: What passes and yet should be known.
    """

    directory: Path
    manifest: Manifest
    samples: list[Sample]
    rows: list[ParityRow]
    layers: LayerComparison
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether no row failed a gate."""
        return not any(row.failures for row in self.rows)


def check_parity(
    path: Path,
    *,
    source: WeightSource | None = None,
    samples: Sequence[Sample] = (),
    progress: Progress | None = None,
) -> ParityResult:
    """Compare graphs and engines with PyTorch in float64.

    Args:
        path: A model directory, of which every graph and the engines that fit this machine are compared; or one engine
            in a model directory's `plans/`.
        source: Where to load the weights from; the manifest's own source if None.
        samples: Batches to compare on; if there are none, random pixels in grids that have been trouble before.
        progress: Told about each step.

    Raises:
        ManifestError: The model directory is not one, or damaged.
        CheckpointError: The weights cannot be loaded again, or are not those that were exported.
        ParityError: Nothing can be compared on this machine.
        BackendError: ONNX Runtime is not installed, or the engine does not run here.
    """
    progress = progress or Progress()
    directory = model_directory_of(path)
    if directory is None:
        raise ParityError(
            f"{path} is not in the plans/ of a model directory, which says what it should compute",
            hint="name the model directory, or put the engine back into it",
        )
    manifest = Manifest.read(directory)
    config = manifest.config
    weights = source or WeightSource.from_manifest(manifest.source, config)
    samples = list(samples) or samples_from_grids(config)

    def load(float_type: str) -> VisionEncoderModule:
        loaded = weights.load(DTYPES[float_type])
        _refuse_other_weights(manifest, loaded.source)
        return loaded.encoder

    def reference() -> VisionEncoderModule:
        return Float64Encoder(load("fp32"))

    graphs, candidates = _candidates(path, directory, manifest, progress)
    float_types = sorted({candidate.float_type for candidate in candidates}, reverse=True)
    eager = {float_type: (lambda t=float_type: load(t)) for float_type in float_types}
    beside = [
        Candidate(
            None, float_type, float_type, TorchRunner(_EAGER.format(float_type), encoder, config)
        )
        for float_type, encoder in eager.items()
    ]
    candidates = [*beside, *candidates]
    distances = _distances(
        [
            TorchRunner(REFERENCE, reference, config),
            *(candidate.runner for candidate in candidates),
        ],
        samples,
        progress,
    )
    rows = _rows(candidates, samples, distances)
    if not any(row.subject for row in rows):
        raise ParityError(
            "every sample is beyond the engine's profile",
            hint="build it with a larger --max-patches",
        )
    layers = compare_layers(
        _furthest_off(rows, samples), graphs, reference=reference, eager=eager, progress=progress
    )
    return ParityResult(
        directory,
        manifest,
        list(samples),
        rows,
        layers,
        overflow_warnings(layers.magnitudes, float_types),
    )


def _candidates(
    path: Path, directory: Path, manifest: Manifest, progress: Progress
) -> tuple[dict[str, tuple[Path, GraphFacts]], list[Candidate]]:
    """The graphs to look into layer by layer, and all there is to compare."""
    names = [name for name in manifest.files if name.endswith(".onnx")]
    engine = EngineRecord.read(path) if path.is_file() else None
    if engine is not None:
        open_backend(engine.backend, path, BackendOptions()).close()
        # An engine does not show its layers; the graph it was built from has the same types.
        names = [engine.graph["name"]]
    graphs, candidates = {}, []
    for name in names:
        manifest.verify(directory, [name])
        model = ir.load(directory / name)
        facts = facts_of_graph(model)
        manifest.verify(directory, facts.data_files)
        graphs[name] = (directory / name, facts)
        if engine is not None:
            continue
        if facts.float_type == "bf16":
            progress.note(
                f"{name} is bf16, which ONNX Runtime's CPU provider cannot run: every op is rounded instead"
            )
        else:
            runner = OnnxrtRunner(_session_loader(directory / name), name=name)
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
            if name == CPU_GRAPH and (kernels := find_cpu_kernels(directory)[0]):
                runner = OnnxrtRunner(
                    _session_loader(directory / name, kernels), name=f"{name} (AMX kernels)"
                )
                candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
            if name == OPENVINO_GRAPH and _openvino_is_installed(name, progress):
                runner = BackendRunner(
                    f"{name} (OpenVINO)", directory, backend="openvino", config=manifest.config
                )
                candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
        if facts.float_type != "fp32":
            rounded = rounded_model(model, facts.float_type)
            runner = OnnxrtRunner(
                lambda model=rounded: session_from_model(model, directory), name=f"{name} (rounded)"
            )
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
    if engine is not None:
        return graphs, [_engine_candidate(path, engine, directory)]
    return graphs, [*candidates, *_engines_for_this_machine(directory, progress)]


def _openvino_is_installed(graph: str, progress: Progress) -> bool:
    try:
        import_openvino()
    except BackendError as error:
        progress.note(f"{graph} is compared in ONNX Runtime alone: {error}")
        return False
    return True


def _session_loader(graph: Path, kernels: Path | None = None) -> Callable[[], Any]:
    return lambda: create_session(graph, provider="CPUExecutionProvider", kernels=kernels)


def _engine_candidate(engine: Path, record: EngineRecord, directory: Path) -> Candidate:
    """Judged as the graph it was built from, whose types it has."""
    name = f"{PLANS}/{engine.name}"
    facts = facts_of_graph(ir.load(directory / record.graph["name"]))
    return Candidate(name, facts.precision, facts.float_type, EngineRunner(name, engine, record))


def _rows(
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    distances: Mapping[str, Mapping[str, _Compared]],
) -> list[ParityRow]:
    rows = []
    for candidate in candidates:
        gate, runner = GATES[candidate.precision], candidate.runner.name
        beside = distances[_EAGER.format(candidate.float_type)]
        for sample in samples:
            if sample.name not in distances.get(runner, {}):
                continue
            compared, eager = distances[runner][sample.name], beside[sample.name].metrics
            is_torch = candidate.subject is None
            rows.append(
                ParityRow(
                    runner=runner,
                    subject=candidate.subject,
                    precision=candidate.precision,
                    sample=sample.name,
                    patches=sample.num_patches,
                    metrics=compared.metrics,
                    limit=None if is_torch else gate.limit(eager),
                    failures=[] if is_torch else gate.failures(compared.metrics, eager),
                    token_errors=compared.token_errors,
                )
            )
    return rows


def _furthest_off(rows: Sequence[ParityRow], samples: Sequence[Sample]) -> Sample:
    """The sample that the layers are worth looking at on."""

    def badness(row: ParityRow) -> tuple[int, bool, float]:
        # Precisions differ by orders of magnitude: what counts is the distance from what is allowed.
        return (
            row.metrics.non_finite,
            bool(row.failures),
            row.metrics.relative_l2 / (row.limit or 1.0),
        )

    worst = max((row for row in rows if row.subject), key=badness)
    return next(sample for sample in samples if sample.name == worst.sample)


def _distances(
    runners: list[BaseRunner], samples: Sequence[Sample], progress: Progress
) -> dict[str, dict[str, _Compared]]:
    """Runner -> sample -> distance from the first runner. Polygraphy runs them, each loaded only while it runs."""
    from polygraphy.exception import PolygraphyException

    class Feeds(list):  # type: ignore[type-arg]
        """The batches, counted as the runner takes them."""

        def __iter__(self) -> Any:
            for feed in super().__iter__():
                yield feed
                progress.advance()

    found: dict[str, dict[str, _Compared]] = {}

    def run(runner: BaseRunner) -> tuple[list[str], RunResults]:
        taken = [
            sample
            for sample in samples
            if accepts(runner, sample.num_patches, len(sample.grid_thw))
        ]
        for sample in samples:
            if sample not in taken:
                progress.note(
                    f"{runner.name} does not take {sample.name}, which is beyond its profile"
                )
        progress.step(f"running {runner.name}", total=len(taken))
        feeds = Feeds(
            OrderedDict(pixel_values=sample.pixel_values, grid_thw=sample.grid_thw)
            for sample in taken
        )
        return [sample.name for sample in taken], Comparator.run([runner], data_loader=feeds)

    with captured_messages() as messages:
        try:
            every, (reference, *_) = run(runners[0])
            by_sample = dict(zip(every, reference[1], strict=True))
            for runner in runners[1:]:
                names, results = run(runner)
                if not names:
                    continue
                wanted = RunResults([(REFERENCE, [by_sample[name] for name in names]), *results])
                (comparison,) = Comparator.compare_accuracy(
                    wanted, comparisons=[(0, 1)], compare_func=_compare
                )
                rows = comparison[REFERENCE, runner.name]
                found[runner.name] = {
                    name: row["image_embeds"] for name, row in zip(names, rows, strict=True)
                }
        except PolygraphyException as error:
            raise ParityError("\n  ".join(dict.fromkeys([*messages, str(error)]))) from error
    return found


@dataclasses.dataclass
class _Compared:
    """What Polygraphy keeps of a comparison. It never fails by itself: the gates need PyTorch's own figures too."""

    metrics: Metrics
    token_errors: npt.NDArray[np.float64]

    def __bool__(self) -> bool:
        return True


def _compare(reference: Any, result: Any) -> OrderedDict[str, _Compared]:
    pair = result["image_embeds"], reference["image_embeds"]
    return OrderedDict(image_embeds=_Compared(metrics(*pair), token_errors(*pair)))


def _engines_for_this_machine(directory: Path, progress: Progress) -> list[Candidate]:
    if current_compute_capability() is None:
        return []
    found = []
    for engine in sorted((directory / PLANS).glob("*.engine")):
        try:
            record = EngineRecord.read(engine)
            open_backend(record.backend, engine, BackendOptions()).close()
        except (BackendError, ManifestError) as error:
            progress.note(f"{engine.name} is not compared: {error}")
            continue
        found.append(_engine_candidate(engine, record, directory))
    return found


def _refuse_other_weights(manifest: Manifest, source: Mapping[str, Any]) -> None:
    exported, loaded = manifest.source.get("sha256"), source.get("sha256")
    if exported and loaded and exported != loaded:
        raise ParityError(
            f"the weights have sha256 {loaded}, those that were exported had {exported}",
            hint="name the checkpoint that was exported with --checkpoint, or export again",
        )


def record_parity(result: ParityResult) -> None:
    """Write a summary of a result into the manifest, under the name of each graph or engine.

    Raises:
        ManifestError: The manifest is missing or malformed.
        OutputError: It cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    parity: dict[str, Any] = {}
    for subject in dict.fromkeys(row.subject for row in result.rows if row.subject is not None):
        rows = [row for row in result.rows if row.subject == subject]
        parity[subject] = {
            "reference": REFERENCE,
            "date": now,
            "passed": not any(row.failures for row in rows),
            "grids": _summary([row for row in rows if row.runner == subject]),
            "rounded": _summary([row for row in rows if row.runner == f"{subject} (rounded)"]),
            **_other_runtimes(rows, subject),
            "layers": result.layers.summary(subject),
        }
    Manifest.read(result.directory).update(result.directory, parity=parity)


def _other_runtimes(rows: Sequence[ParityRow], subject: str) -> dict[str, Any]:
    """Of runtimes that a graph was run in besides ONNX Runtime, by name, where there are any."""
    said = (subject, f"{subject} (rounded)")
    names = dict.fromkeys(row.runner for row in rows if row.runner not in said)
    found = {name: _summary([row for row in rows if row.runner == name]) for name in names}
    return {"other_runtimes": found} if found else {}


def _summary(rows: Sequence[ParityRow]) -> dict[str, Any]:
    return {
        row.sample: {**row.metrics.to_dict(), "patches": row.patches, "failures": row.failures}
        for row in rows
    }
