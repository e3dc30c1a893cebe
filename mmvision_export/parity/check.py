"""Is the exported graph the same function as the PyTorch encoder? Measured with Polygraphy, for each input.

Every result is compared with the encoder in float64. The runners: PyTorch in the graph's precision, which shows what
that precision costs by itself; ONNX Runtime on each graph of the model directory; each float16 and bfloat16 graph once
more with every intermediate result rounded to its type, as a GPU rounds it; and, where there is a GPU, the engines that
fit it. On the input where they are furthest off, the graphs are then compared layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polygraphy.backend.base import BaseRunner

from mmvision_export.artifacts.manifest import Manifest, model_directory_of
from mmvision_export.core.errors import ParityError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.parity.candidates import Candidate, candidates_from_path
from mmvision_export.parity.float64 import Float64Encoder
from mmvision_export.parity.gates import GATES
from mmvision_export.parity.layers import compare_layers
from mmvision_export.parity.magnitudes import overflow_warnings
from mmvision_export.parity.measuring import (
    Distance,
    distances_from_runner,
    embeds_from_runner,
    runner_errors,
)
from mmvision_export.parity.result import REFERENCE, ParityResult, ParityRow
from mmvision_export.parity.runners import TorchRunner
from mmvision_export.parity.samples import Sample, samples_from_grids

__all__ = ["check_parity"]

_EAGER = "pytorch-{}"


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

    graphs, candidates = candidates_from_path(path, directory, manifest, progress)
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
        TorchRunner(REFERENCE, reference, config),
        [candidate.runner for candidate in candidates],
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


def _rows(
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    distances: Mapping[str, Mapping[str, Distance]],
) -> list[ParityRow]:
    rows = []
    for candidate in candidates:
        gate, runner = GATES[candidate.precision], candidate.runner.name
        beside = distances[_EAGER.format(candidate.float_type)]
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
        # Precisions differ by orders of magnitude: what counts is the distance from what is allowed.
        return (
            row.metrics.non_finite,
            bool(row.failures),
            row.metrics.relative_l2 / (row.limit or 1.0),
        )

    worst = max((row for row in rows if row.subject), key=badness)
    return next(sample for sample in samples if sample.name == worst.sample)


def _distances(
    reference: BaseRunner,
    runners: Sequence[BaseRunner],
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, dict[str, Distance]]:
    """Runner -> sample -> distance from the reference; each runner is loaded only while it runs."""
    found = {}
    with runner_errors():
        with reference:
            expected = embeds_from_runner(reference, samples, progress=progress)
        for runner in runners:
            with runner:
                found[runner.name] = distances_from_runner(
                    runner, samples, reference=expected, progress=progress
                )
    return found


def _refuse_other_weights(manifest: Manifest, source: Mapping[str, Any]) -> None:
    exported, loaded = manifest.source.get("sha256"), source.get("sha256")
    if exported and loaded and exported != loaded:
        raise ParityError(
            f"the weights have sha256 {loaded}, those that were exported had {exported}",
            hint="name the checkpoint that was exported with --checkpoint, or export again",
        )
