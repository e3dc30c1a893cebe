"""Is the exported graph the same function as the PyTorch encoder?

Every result is compared with the encoder in float64. The runners: PyTorch in the graph's precision,
which shows what that precision costs by itself; ONNX Runtime on each graph of the model directory;
each float16 and bfloat16 graph once more with every intermediate result rounded to its type, as a
GPU rounds it; and, where there is a GPU, the engines that fit it. On the input where they are
furthest off, the graphs are then compared layer by layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import CPU_GRAPH, Manifest, model_directory_of
from mmvision_export.core.errors import BackendError, ManifestError, ParityError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.candidates import (
    Candidate,
    candidate_from_engine,
    candidates_from_graphs,
    candidates_from_openvino,
    candidates_from_plans,
    candidates_from_pytorch,
    eager_name,
)
from mmvision_export.parity.encoders import Encoders
from mmvision_export.parity.graphs import graphs_from_directory
from mmvision_export.parity.layers import compare_layers
from mmvision_export.parity.magnitudes import overflow_warnings
from mmvision_export.parity.measuring import (
    Distance,
    Embeds,
    distance_from_embeds,
    distances_from_runners,
    embeds_from_runner,
    runner_errors,
)
from mmvision_export.parity.result import REFERENCE, ParityResult, ParityRow
from mmvision_export.parity.runners import TorchRunner
from mmvision_export.parity.samples import Sample, samples_from_grids
from mmvision_export.runtime.backends.onnxruntime_amx import verified_library

__all__ = ["check_parity", "directory_from_path"]


def directory_from_path(path: Path) -> Path:
    """The model directory that a path is, or that an engine lies in.

    Raises:
        ParityError: It is a file that lies in none.
    """
    directory = model_directory_of(path)
    if directory is None:
        raise ParityError(
            f"{path} is not in the plans/ of a model directory, and only the directory tells "
            f"what the engine should compute",
            hint="name the model directory, or put the engine back into it",
        )
    return directory


def check_parity(
    path: Path,
    *,
    manifest: Manifest | None = None,
    source: WeightSource | None = None,
    samples: Sequence[Sample] = (),
    kernel_library: Path | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> ParityResult:
    """Compare graphs and engines with PyTorch in float64.

    Args:
        path: A model directory, of which every graph and the engines that fit this machine are
            compared; or one engine in a model directory's `plans/`.
        manifest: The directory's, if it has been read.
        source: Where to load the weights from; the manifest's own source if None.
        samples: Batches to compare on; if there are none, random pixels in grids that have been
            trouble before.
        kernel_library: Compare `model.cpu.onnx` as `onnxruntime-amx` runs it with this library too.
        trust: Whether engines of the directory are opened that this user has not built here: they
            are executable content. One that is named is.
        progress: Told about each step.

    Raises:
        ManifestError: The model directory is not one, or damaged.
        CheckpointError: The weights cannot be loaded again, or are not those that were exported.
        ParityError: Nothing can be compared on this machine.
        BackendError: ONNX Runtime is not installed, or the engine or the library does not run here.
    """
    progress = progress or Progress()
    directory = directory_from_path(path)
    manifest = manifest or Manifest.read(directory)
    if kernel_library is not None:
        verified_library(kernel_library, named=True)
        if path.is_file() or CPU_GRAPH not in manifest.files:
            raise ParityError(f"{path} has no {CPU_GRAPH} to run with {kernel_library}")
    samples = list(samples) or samples_from_grids(manifest.config)
    encoders = Encoders(
        source or WeightSource.from_manifest(manifest.source, manifest.config), manifest
    )
    if path.is_file():
        # An engine does not show its layers; the graph it was built from has the same types.
        record = EngineRecord.read(path)
        graphs = graphs_from_directory(directory, manifest, [record.graph.name])
        on_cpu, engines = [], [candidate_from_engine(path, record, graphs=graphs, trust=True)]
    else:
        names = [name for name in manifest.files if name.endswith(".onnx")]
        graphs = graphs_from_directory(directory, manifest, names)
        on_cpu = [
            *candidates_from_graphs(
                graphs,
                directory,
                manifest.config,
                kernel_library=kernel_library,
                progress=progress,
            ),
            *candidates_from_openvino(graphs, directory, manifest.config, progress=progress),
        ]
        engines = candidates_from_plans(directory, graphs=graphs, trust=trust, progress=progress)

    with runner_errors():
        # Engines come first: whether one runs here at all is known before the long work.
        embeds = _embeds_from_engines(engines, samples, asked_for=path, progress=progress)
        engines = [engine for engine in engines if engine.runner.name in embeds]
        float_types = sorted(
            {candidate.float_type for candidate in (*on_cpu, *engines)}, reverse=True
        )
        in_pytorch = candidates_from_pytorch(encoders, float_types)
        with TorchRunner(REFERENCE, encoders.load_reference, manifest.config) as runner:
            expected = embeds_from_runner(runner, samples, progress=progress)
        distances = distances_from_runners(
            [candidate.runner for candidate in (*in_pytorch, *on_cpu)],
            samples,
            reference=expected,
            progress=progress,
        )
    for runner_name, found in embeds.items():
        distances[runner_name] = {
            sample: distance_from_embeds(given, reference=expected[sample])
            for sample, given in found.items()
        }
    rows = _rows([*in_pytorch, *on_cpu, *engines], samples, distances)
    if not any(row.subject for row in rows):
        raise ParityError(
            "every sample is beyond the engine's profile",
            hint="build it with a larger --max-patches",
        )
    layers = compare_layers(
        _furthest_off(rows, samples),
        graphs,
        encoders=encoders,
        float_types=float_types,
        progress=progress,
    )
    return ParityResult(
        directory,
        manifest,
        list(samples),
        rows,
        layers,
        overflow_warnings(layers.magnitudes, float_types),
    )


def _embeds_from_engines(
    engines: Sequence[Candidate],
    samples: Sequence[Sample],
    *,
    asked_for: Path,
    progress: Progress,
) -> dict[str, dict[str, Embeds]]:
    """Runner -> sample -> embeddings.

    Of a model directory's engines, those that do not fit are passed over.
    """
    found = {}
    for engine in engines:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(engine.runner)
            except (BackendError, ManifestError) as error:
                if asked_for.is_file():
                    raise
                progress.note(f"{Path(engine.runner.name).name} is not compared: {error.message}")
                continue
            found[engine.runner.name] = embeds_from_runner(
                engine.runner, samples, progress=progress
            )
    return found


def _rows(
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    distances: Mapping[str, Mapping[str, Distance]],
) -> list[ParityRow]:
    rows = []
    for candidate in candidates:
        gate, runner = PRECISIONS[candidate.precision].gate, candidate.runner.name
        beside = distances[eager_name(candidate.float_type)]
        for sample in samples:
            if sample.name not in distances[runner]:
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
        # Precisions differ by orders of magnitude: what counts is the distance from what is
        # allowed.
        return (
            row.metrics.non_finite,
            bool(row.failures),
            row.metrics.relative_l2 / (row.limit or 1.0),
        )

    worst = max((row for row in rows if row.subject), key=badness)
    return next(sample for sample in samples if sample.name == worst.sample)
