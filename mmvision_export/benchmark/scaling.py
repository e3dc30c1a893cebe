"""How time and memory grow with the size of images: counted for each way of attention, and fitted."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmvision_export.benchmark.result import Result
from mmvision_export.benchmark.workloads import Workload
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory

__all__ = ["Fit", "fit_of", "scaling_markdown"]

_LEAST_POINTS = 4  # two are what a fit has free


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds of a batch as `per_patch` * patches + `per_pair` * sum of the images' squares.

    Attributes:
        per_patch: Seconds.
        per_pair: Seconds, of one query and one key of the same image.
        worst: Largest distance of a measured time from the fit, as a share of it.
        points: Batches that were fitted.
    """

    per_patch: float
    per_pair: float
    worst: float
    points: int


def fit_of(result: Result, side: str) -> Fit | None:
    """Least squares of the relative distances; None for fewer than four batches."""
    pairs = [(w, m) for w in result.workloads if (m := result.of(side, w.name)) is not None]
    if len(pairs) < _LEAST_POINTS:
        return None
    counts = np.array([[w.patches, _squares(w)] for w, _ in pairs], np.float64)
    seconds = np.array([m.median for _, m in pairs])
    shares = counts / seconds[:, None]
    (per_patch, per_pair), *_ = np.linalg.lstsq(shares, np.ones(len(pairs)), rcond=None)
    worst = float(np.abs(shares @ [per_patch, per_pair] - 1).max())
    return Fit(float(per_patch), float(per_pair), worst, len(pairs))


def scaling_markdown(result: Result) -> str:
    """Two sections of the page: the fits, and what each way of attention does and keeps."""
    config = EncoderConfig(**result.model["config"])
    lines = [
        "## Does the cost follow the sum of the squares?",
        "",
        "We fit each side's times by a * patches + b * sum over images of their patches squared. The "
        "batches of several images are the test: a side whose cost is the square of the whole batch is "
        "far from its fit there.",
        "",
        "| side | a, µs a patch | b, ns a pair | farthest time from the fit | batches |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for side in result.sides:
        if fit := fit_of(result, side):
            cells = (f"{1e6 * fit.per_patch:.0f}", f"{1e9 * fit.per_pair:.1f}", f"{fit.worst:.0%}")
            lines.append(f"| {result.label(side)} | {' | '.join(cells)} | {fit.points} |")
    lines += [
        "",
        "## Operations and memory of each way of attention, counted",
        "",
        "These figures are counted from the dimensions of the encoder above. Nothing here is measured. "
        "*Segments* is the work of a plugin, of packed attention and of `model.cpu.onnx`. *Slots* is "
        "`uniform` attention, with each image in a slot of its own length. *Dense* masks one product of "
        "the whole launch. On a CPU without a fused kernel it keeps all scores.",
        "",
        "TFLOP of the whole encoder:",
        "",
        "| workload | segments | slots | dense |",
        "| --- | ---: | ---: | ---: |",
    ]
    ways = {workload.name: _ways(config, workload) for workload in result.workloads}
    lines += [f"| {name} | {' | '.join(tflop)} |" for name, (tflop, _) in ways.items()]
    lines += [
        "",
        "GB beside the weights:",
        "",
        "| workload | segments, CPU flavour | slots, fused kernel | dense, fused kernel | dense, scores kept |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {name} | {' | '.join(memory)} |" for name, (_, memory) in ways.items()]
    return "\n".join(lines) + "\n"


def _ways(config: EncoderConfig, workload: Workload) -> tuple[list[str], list[str]]:
    """TFLOP of segments, slots and dense; GB of segments, slots, dense and dense with its scores."""
    lengths = [t * h * w for t, h, w in workload.grid]
    patches, images = workload.patches, len(lengths)
    segments, dense = Costs(config, masked=False), Costs(config, masked=True)
    flops = (
        segments.of(patches, _squares(workload)),
        sum(segments.uniform(1, length) for length in lengths),
        dense.of(patches, 0),
    )
    blocked = LaunchMemory(config=config, way="blocked").of(patches, rows=images)
    slots = LaunchMemory(config=config, way="uniform", fused=True).image(max(lengths))
    fused = LaunchMemory(config=config, way="dense", fused=True).of(patches, rows=images)
    kept = LaunchMemory(config=config, way="dense").of(patches, rows=images)
    memory = [f"{each.total / 1e9:.2g}" for each in (blocked, slots, fused)]
    return [f"{each / 1e12:.3g}" for each in flops], [*memory, f"{kept.total / 1e9:.3g}"]


def _squares(workload: Workload) -> int:
    return sum((t * h * w) ** 2 for t, h, w in workload.grid)
