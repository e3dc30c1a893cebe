"""What a run of the benchmark knows: the sides, the machine, and each measurement."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from mmvision_export.benchmark.sides import label_of
from mmvision_export.benchmark.workloads import Workload
from mmvision_export.core.errors import BenchmarkError, ManifestError
from mmvision_export.core.files import json_from_file
from mmvision_export.core.records import record_from_json

__all__ = ["Measurement", "Result", "result_from_file"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One side on one workload.

    Attributes:
        side: Backend or peer.
        workload: Name of the workload.
        seconds: Every measured run, in order; run i of each side was made in the same round. A side
            whose bfloat16 is emulated has one run only.
        warm: Whether a run before the first was thrown away. Only the longest workloads have none.
        cpu_s: CPU seconds of the process, median; unlike the time, hardly changed by what else the
            machine does. None where it was not kept.
        foreign_cpus: CPUs that other processes used meanwhile, median; more than a tenth is a
            disturbed measurement. None where it was not kept.
        above_bytes: Peak resident memory while running, above that of the opened model; without
            mapped files, of which a runtime that reads its weights from their file only when it
            needs them has more then.
        peak_bytes: Peak resident memory while running, with mapped files. None where it was
            not kept.
        relative_l2: Distance of the output from that of the first side in the model's precision.
        min_cosine: Least cosine similarity of any image token with that side's.
        device_ms: Median between CUDA events, on a GPU.
    """

    side: str
    workload: str
    seconds: list[float]
    warm: bool
    cpu_s: float | None
    foreign_cpus: float | None
    above_bytes: int
    peak_bytes: int | None
    relative_l2: float
    min_cosine: float
    device_ms: float | None

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.seconds)


@dataclasses.dataclass
class Result:
    """All that a run of the benchmark knows, as JSON values but for the measurements' class."""

    machine: dict[str, Any]
    model: dict[str, Any]
    threads: int
    sides: dict[str, dict[str, Any]]
    gemm_gflops: dict[
        str, float
    ]  # by runtime: the best of its float32 products of the model's size
    workloads: list[Workload]
    measurements: list[Measurement]
    skipped: list[str]
    # By side and workload: what a side said that has no memory for it.
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    workload_set: str = "standard"
    # What a reader must know of figures that this run has not written itself.
    note: str = ""

    @property
    def gemm_peak_gflops(self) -> float:
        """The fastest float32 matrix product of any side, in GFLOP/s."""
        return max(self.gemm_gflops.values())

    def of(self, side: str, workload: str) -> Measurement | None:
        """One measurement, if it was made."""
        return next(
            (m for m in self.measurements if (m.side, m.workload) == (side, workload)), None
        )

    def ratio(self, other: str, workload: str) -> float | None:
        """How many times as long another side takes as the first.

        The median over rounds of both in the same round.
        """
        ours, theirs = self.of(next(iter(self.sides)), workload), self.of(other, workload)
        if ours is None or theirs is None:
            return None
        # Of a side in fewer rounds, those are the first.
        return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False))

    @property
    def photograph(self) -> Workload | None:
        """The workload that stands for one photograph, None where no workload is one image.

        The largest single image before which the first side was warm; where it was warm before
        none, the largest.
        """
        first = next(iter(self.sides))
        images = [
            (m.warm, w.patches, w)
            for w in self.workloads
            if len(w.grid) == 1 and (m := self.of(first, w.name)) is not None
        ]
        return max(images, key=lambda each: each[:2])[2] if images else None

    def fastest_first(self, workload: Workload) -> list[tuple[str, float]]:
        """Each side that ran a workload, with its median seconds."""
        found = [
            (side, m.median)
            for side in self.sides
            if (m := self.of(side, workload.name)) is not None
        ]
        return sorted(found, key=lambda pair: pair[1])

    def label(self, side: str) -> str:
        """What people call a side, with its precision."""
        name, precision = label_of(side), str(self.sides[side]["precision"])
        return name if precision in name.lower() else f"{name} {precision}"

    def emulated(self) -> list[str]:
        """Sides whose bfloat16 this CPU has no products for."""
        return [name for name, facts in self.sides.items() if facts.get("emulated")]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the figures that follow from the times."""
        content = dataclasses.asdict(self)
        first = next(iter(self.sides))
        by_name = {workload.name: workload for workload in self.workloads}
        for row, m in zip(content["measurements"], self.measurements, strict=True):
            patches, flops = by_name[m.workload].patches, self.flops(by_name[m.workload])
            row |= {
                "median_s": m.median,
                "spread_s": [min(m.seconds), max(m.seconds)],
                "patches": patches,
                "patches_per_s": patches / m.median,
                "image_tokens_per_s": patches / self.model["patches_per_token"] / m.median,
                "gflops": flops / m.median / 1e9,
                "share_of_gemm_peak": flops / m.median / 1e9 / self.gemm_peak_gflops,
                "times_the_first_side": 1.0 if m.side == first else self.ratio(m.side, m.workload),
            }
        return content

    def flops(self, workload: Workload) -> float:
        """Floating-point operations of a workload."""
        return float(self.model["flops"][workload.name])

    def least_bytes(self, workload: Workload) -> float:
        """Bytes that a workload moves at least: each weight, input and output once."""
        return float(self.model["bytes"][workload.name])


def result_from_file(path: Path) -> Result:
    """A result from its `results.json`. Figures that follow from others are not read.

    Raises:
        BenchmarkError: The file is no result, or has no measurement of its first side.
        InputError: The file is missing or no JSON.
    """
    content = json_from_file(path)
    own = {field.name for field in dataclasses.fields(Measurement)}
    try:
        content["measurements"] = [
            {key: value for key, value in row.items() if key in own}
            for row in content["measurements"]
        ]
        result = record_from_json(Result, content, name="the result")
        known = {workload.name for workload in result.workloads}
        for m in result.measurements:
            if m.side not in result.sides or m.workload not in known or not m.seconds:
                raise ManifestError(
                    f"a measurement has an unknown side or workload, or no times: {m.side}, {m.workload}"
                )
        if not any(m.side == next(iter(result.sides)) for m in result.measurements):
            raise ManifestError("the first side has no measurement")
    except (ManifestError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BenchmarkError(
            f"{path} is no result of a benchmark: {error}",
            hint="name a results.json that mmvision benchmark has written",
        ) from error
    return result
