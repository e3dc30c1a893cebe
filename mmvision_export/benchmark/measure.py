"""Runs the sides of a comparison in turns, each in its own process, and keeps what was measured as it goes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.benchmark.workloads import Workload, work_of
from mmvision_export.core.errors import BenchmarkError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.progress import Progress
from mmvision_export.version import __version__

__all__ = ["Measurement", "Result", "measure"]

# What a dense attention matrix costs grows with the square of the batch: 16 heads x 8192^2 scores are 4.3 GB.
MAX_PATCHES = {"transformers-eager": 4096, "nemo": 8192}
_PAUSE_S = 0.2  # the thread pool of the side before spins on for a while
_MAX_RELATIVE_L2 = 1e-5  # as test_independent.py holds float32 implementations to each other
_MIN_COSINE_INT8 = 0.99


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One side on one workload.

    Attributes:
        side: Backend or peer.
        workload: Name of the workload.
        seconds: Every measured run, in order; run i of each side was made in the same round.
        warm: Whether a run before the first was thrown away. Only the longest workloads have none.
        cpu_s: CPU seconds of the process, median; unlike the time, hardly changed by what else the machine does.
        foreign_cpus: CPUs that other processes used meanwhile, median; more than a tenth is a disturbed measurement.
        above_bytes: Peak resident memory while running, above that of the opened model; without mapped files, of
            which a runtime that reads its weights from their file only when it needs them has more then.
        peak_bytes: Peak resident memory while running, with mapped files.
        relative_l2: Distance of the output from the first side's.
        device_ms: Median between CUDA events, on a GPU.
    """

    side: str
    workload: str
    seconds: list[float]
    warm: bool
    cpu_s: float
    foreign_cpus: float
    above_bytes: int
    peak_bytes: int
    relative_l2: float
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
        """How many times as long another side takes as the first: the median over rounds of both in the same round."""
        ours, theirs = self.of(next(iter(self.sides)), workload), self.of(other, workload)
        if ours is None or theirs is None:
            return None
        return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))

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


class _Side:
    """A worker process."""

    def __init__(self, name: str, directory: Path, threads: int) -> None:
        self.name = name
        # One thread count for every library, set before it is loaded.
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        command = [
            sys.executable,
            "-m",
            "mmvision_export.benchmark.worker",
            name,
            str(directory),
            str(threads),
        ]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()[-1:] or [
                f"exit code {self._process.wait()}"
            ]
            raise BenchmarkError(
                f"{self.name} died: {said[0]}", hint="out of memory? Leave it out, or try --quick"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}", hint=reply.get("hint"))
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


@contextlib.contextmanager
def _workers(
    names: Sequence[str], directory: Path, threads: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    sides: dict[str, _Side] = {}
    facts: dict[str, dict[str, Any]] = {}
    peaks: dict[str, _Side] = {}
    try:
        for name in names:
            progress.step(f"opening {name}")
            sides[name] = _Side(name, directory, threads)
            facts[name] = sides[name].ask(do="open")
        # Not the sides themselves: what a matrix product needs would count as the model's memory.
        for name in _runtimes(names):
            peaks[name] = _Side(name, directory, threads)
        yield {"sides": sides, "facts": facts, "peaks": peaks}
    finally:
        for side in (*sides.values(), *peaks.values()):
            side.close()


def measure(
    directory: Path,
    sides: Sequence[str],
    workloads: Sequence[Workload],
    *,
    threads: int,
    repeats: int,
    seconds_per_workload: float,
    keep: Callable[[Result], None],
    progress: Progress | None = None,
) -> Result:
    """Measure every side on every workload, round by round: one run of each side, then the next round.

    A round is thrown away first, to warm up, unless it alone takes longer than `seconds_per_workload`. Rounds follow
    until there are `repeats`, or that time is over.

    Args:
        directory: The model directory.
        sides: Backends and peers; the others are compared with the first.
        workloads: What to run.
        threads: Of each side.
        repeats: Most rounds.
        seconds_per_workload: Time for a workload, all sides together.
        keep: Given the result so far after each workload.
        progress: Told about each step.

    Raises:
        BenchmarkError: A side cannot be opened, fails, or gives other numbers than the first.
        ManifestError: The model directory is not one.
    """
    progress = progress or Progress()
    manifest = Manifest.read(directory)
    config = manifest.config
    if len(set(sides)) != len(sides) or not sides:
        raise BenchmarkError(f"each side must be named once, got {', '.join(sides) or 'none'}")
    with (
        _workers(sides, directory, threads, progress) as opened,
        tempfile.TemporaryDirectory() as folder,
    ):
        workers, facts = opened["sides"], opened["facts"]

        def measure_gemm(best: dict[str, float]) -> dict[str, float]:
            for side in opened["peaks"].values():
                reply = side.ask(do="gemm")
                best[reply["runtime"]] = max(best.get(reply["runtime"], 0.0), reply["gflops"])
            return best

        progress.step("measuring the GEMM peak")
        result = Result(
            machine=_machine(),
            model={
                "directory": directory.name,
                "precision": manifest.precision,
                "patches_per_token": config.patches_per_token,
                "config": config.to_json(),
                "source": manifest.source.get("kind"),
                "flops": {
                    w.name: sum(x.flops for x in work_of(config, w.grid).values())
                    for w in workloads
                },
                "bytes": {
                    w.name: sum(x.bytes for x in work_of(config, w.grid).values())
                    for w in workloads
                },
            },
            threads=threads,
            sides=facts,
            gemm_gflops=measure_gemm({}),
            workloads=[],
            measurements=[],
            skipped=[],
        )
        for workload in workloads:
            running = [
                name
                for name in sides
                if workload.patches <= MAX_PATCHES.get(name, workload.patches)
            ]
            result.skipped += [f"{name}: {workload.name}" for name in sides if name not in running]
            progress.step(workload.name, total=repeats)
            replies = _rounds(
                {name: workers[name] for name in running},
                {"do": "run", "grid": workload.grid, "patch_dim": config.patch_dim},
                repeats=repeats,
                budget_s=seconds_per_workload,
                folder=Path(folder),
                progress=progress,
            )
            result.workloads.append(workload)
            result.measurements += _measurements(replies, workload, facts, Path(folder))
            measure_gemm(result.gemm_gflops)
            keep(result)
    return result


def _runtimes(sides: Sequence[str]) -> list[str]:
    """One side for each runtime whose matrix products are measured."""
    kinds = {}
    for name in reversed(sides):
        backend = name.partition(":")[0]
        kinds[backend if "onnxruntime" in backend else "torch"] = name
    return list(kinds.values())


def _rounds(
    workers: dict[str, _Side],
    request: dict[str, Any],
    *,
    repeats: int,
    budget_s: float,
    folder: Path,
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    start = time.perf_counter()
    for round_ in range(repeats + 1):
        if round_ and time.perf_counter() - start > budget_s and len(next(iter(replies.values()))):
            break
        # Each side is first as often as last.
        order = list(workers) if round_ % 2 else list(workers)[::-1]
        found = {}
        for name in order:
            time.sleep(_PAUSE_S)
            save = {"save": str(folder / f"{name.replace(':', '_')}.npy")} if round_ == 0 else {}
            found[name] = workers[name].ask(**request, **save)
        first_round_is_all = time.perf_counter() - start > budget_s and round_ == 0
        if round_ or first_round_is_all:
            for name, reply in found.items():
                replies[name].append({**reply, "warm": not first_round_is_all})
            progress.advance()
    return replies


def _measurements(
    replies: dict[str, list[dict[str, Any]]],
    workload: Workload,
    facts: dict[str, dict[str, Any]],
    folder: Path,
) -> list[Measurement]:
    outputs = {name: np.load(folder / f"{name.replace(':', '_')}.npy") for name in replies}
    reference = next(iter(outputs.values()))
    found = []
    for name, runs in replies.items():
        distance = metrics(outputs[name], reference)
        int8 = "int8" in (facts[name]["precision"], next(iter(facts.values()))["precision"])
        same = (
            distance.min_cosine >= _MIN_COSINE_INT8
            if int8
            else distance.relative_l2 <= _MAX_RELATIVE_L2
        )
        if distance.non_finite or not same:
            raise BenchmarkError(
                f"{name} computes something else than {next(iter(replies))} on {workload.name}: relative L2 "
                f"{distance.relative_l2:.2e}, minimum cosine {distance.min_cosine:.6f}",
                hint="a comparison of different functions says nothing; leave this side out",
            )
        device = [run["device_ms"] for run in runs if run["device_ms"] is not None]
        found.append(
            Measurement(
                side=name,
                workload=workload.name,
                seconds=[run["seconds"] for run in runs],
                warm=all(run["warm"] for run in runs),
                cpu_s=statistics.median(run["cpu_s"] for run in runs),
                foreign_cpus=statistics.median(run["foreign_cpus"] for run in runs),
                above_bytes=max(run["peak_bytes"] - run["file_bytes"] for run in runs)
                - (facts[name]["rss_bytes"] - facts[name]["file_bytes"]),
                peak_bytes=max(run["peak_bytes"] for run in runs),
                relative_l2=distance.relative_l2,
                device_ms=statistics.median(device) if device else None,
            )
        )
    return found


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": name,
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mmvision-export": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }
