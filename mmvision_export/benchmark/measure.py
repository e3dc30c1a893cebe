"""Runs the sides of a comparison in turns, each in its own process, and keeps what is measured."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.benchmark.result import Measurement, Result
from mmvision_export.benchmark.workloads import Workload, work_of
from mmvision_export.core.errors import BenchmarkError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.processor import processor_name
from mmvision_export.core.progress import Progress
from mmvision_export.version import __version__

__all__ = ["measure"]

# What a dense attention matrix costs grows with the square of the batch: 16 heads x 8192^2 scores
# are 4.3 GB.
MAX_PATCHES = {"transformers-eager": 4096, "nemo": 8192}
EMULATED_MAX_PATCHES = 1024
"""Most patches for a side whose bfloat16 is emulated, several times slower than float32."""
EMULATED_ROUNDS = 2
"""Rounds that such a side is in: one to warm up, and one that counts."""
FRESH_PATCHES = 32768
"""From so many patches on each run has a process of its own: runtimes keep the memory of a run,
and what all sides keep would not fit together."""
_PAUSE_S = 0.2  # the thread pool of the side before spins on for a while
_MAX_RELATIVE_L2 = 1e-5  # as test_independent.py holds float32 implementations to each other
# The gates of parity compare with PyTorch beside it; here a side only has to be the same function.
_MIN_COSINE = {"int8": 0.99, "bf16": 0.99}


class _Side:
    """A worker process."""

    def __init__(self, name: str, directory: Path, threads: int) -> None:
        self.name, self._directory, self._threads = name, directory, threads
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

    def ask_fresh(self, **request: Any) -> dict[str, Any]:
        """The answer of a process that has done nothing else than to open the side."""
        side = _Side(self.name, self._directory, self._threads)
        try:
            opened = side.ask(do="open")
            return {**side.ask(**request), "opened": opened}
        finally:
            side.close()

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
    workload_set: str = "standard",
    threads: int,
    repeats: int,
    seconds_per_workload: float,
    keep: Callable[[Result], None],
    progress: Progress | None = None,
) -> Result:
    """Measure every side on every workload, round by round.

    One run of each side, then the next round.

    A round is thrown away first, to warm up, unless it alone takes longer than
    `seconds_per_workload`. Rounds follow until there are `repeats`, or that time is over.

    Args:
        directory: The model directory.
        sides: Backends and peers; the others are compared with the first.
        workloads: What to run.
        workload_set: Its name.
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
            workload_set=workload_set,
        )
        for workload in workloads:
            emulated = result.emulated()
            most = {**MAX_PATCHES, **dict.fromkeys(emulated, EMULATED_MAX_PATCHES)}
            running = [name for name in sides if workload.patches <= most.get(name, math.inf)]
            result.skipped += [f"{name}: {workload.name}" for name in sides if name not in running]
            progress.step(workload.name, total=repeats)
            fresh = workload.patches >= FRESH_PATCHES
            if fresh:
                for side in workers.values():
                    side.close()
            replies, refusals = _rounds(
                {name: workers[name].ask_fresh if fresh else workers[name].ask for name in running},
                {"do": "run", "grid": workload.grid, "patch_dim": config.patch_dim},
                repeats=repeats,
                rounds_of=dict.fromkeys(emulated, EMULATED_ROUNDS),
                budget_s=seconds_per_workload,
                folder=Path(folder),
                progress=progress,
            )
            result.workloads.append(workload)
            result.refused |= {f"{name}: {workload.name}": said for name, said in refusals.items()}
            result.measurements += _measurements(
                replies, workload, facts, Path(folder), precision=manifest.precision
            )
            measure_gemm(result.gemm_gflops)
            keep(result)
    return result


def _runtimes(sides: Sequence[str]) -> list[str]:
    """One side for each matrix product: of each backend of ONNX Runtime, OpenVINO's, PyTorch's."""
    kinds: dict[str, str] = {}
    for name in reversed(sides):
        backend = name.partition(":")[0]
        if backend.startswith("openvino"):
            backend = "openvino"
        elif "onnxruntime" not in backend:
            backend = "torch"
        kinds[backend] = name
    return list(kinds.values())


def _rounds(
    asks: dict[str, Callable[..., dict[str, Any]]],
    request: dict[str, Any],
    *,
    repeats: int,
    rounds_of: Mapping[str, int],
    budget_s: float,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Replies of each side by round, and what those said that have no memory for it.

    Sides in `rounds_of` are in so many rounds, outside the budget.
    """
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in asks}
    refused: dict[str, str] = {}
    start = time.perf_counter()
    for round_ in range(repeats + 1):
        if not replies or (
            round_ and time.perf_counter() - start > budget_s and next(iter(replies.values()))
        ):
            break
        # Each side is first as often as last.
        names = [name for name in replies if round_ < rounds_of.get(name, repeats + 1)]
        order = names if round_ % 2 else names[::-1]
        found = {}
        for name in order:
            time.sleep(_PAUSE_S)
            before = time.perf_counter()
            save = {"save": str(folder / f"{name.replace(':', '_')}.npy")} if round_ == 0 else {}
            reply = asks[name](**request, **save)
            if "refused" in reply:
                refused[name] = reply["refused"]
                del replies[name]
                continue
            found[name] = reply
            if name in rounds_of:
                start += time.perf_counter() - before
        first_round_is_all = time.perf_counter() - start > budget_s and round_ == 0
        if round_ or first_round_is_all:
            for name, reply in found.items():
                replies[name].append({**reply, "warm": not first_round_is_all})
            progress.advance()
    return replies, refused


def _measurements(
    replies: dict[str, list[dict[str, Any]]],
    workload: Workload,
    facts: dict[str, dict[str, Any]],
    folder: Path,
    *,
    precision: str,
) -> list[Measurement]:
    """Each side's figures, its output held to that of the first in the model's precision."""
    if not replies:
        return []
    reduced = set(_MIN_COSINE) - {precision}
    outputs = {name: np.load(folder / f"{name.replace(':', '_')}.npy") for name in replies}
    exact = next((name for name in replies if facts[name]["precision"] not in reduced), None)
    reference = exact or next(iter(replies))
    found = []
    for name, runs in replies.items():
        distance = metrics(outputs[name], outputs[reference])
        coarse = reduced & {facts[side]["precision"] for side in (name, reference)}
        same = (
            distance.min_cosine >= min(_MIN_COSINE[p] for p in coarse)
            if coarse
            else distance.relative_l2 <= _MAX_RELATIVE_L2
        )
        if distance.non_finite or not same:
            raise BenchmarkError(
                f"{name} computes another function than {reference} on {workload.name}: relative L2 "
                f"{distance.relative_l2:.2e}, minimum cosine {distance.min_cosine:.6f}",
                hint="leave this side out: only sides that compute the same function can be compared",
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
                above_bytes=max(_above_bytes(run, facts[name]) for run in runs),
                peak_bytes=max(run["peak_bytes"] for run in runs),
                relative_l2=distance.relative_l2,
                min_cosine=distance.min_cosine,
                device_ms=statistics.median(device) if device else None,
            )
        )
    return found


def _above_bytes(run: dict[str, Any], facts: dict[str, Any]) -> int:
    """Peak of a run beyond what its process had once open, without mapped files."""
    opened = run.get("opened", facts)
    peak, once_open = (run["peak_bytes"], opened["rss_bytes"])
    return int(peak - run["file_bytes"] - (once_open - opened["file_bytes"]))


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": processor_name() or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mmvision-export": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }
