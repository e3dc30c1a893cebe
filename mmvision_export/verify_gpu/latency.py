"""Percentiles of each bucket's latency on the device, by CUDA events, beside clocks and power."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from mmvision_export.artifacts.profile import Profile
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import (
    BuiltEngine,
    Opener,
    arrays_on_device,
    open_engine,
)
from mmvision_export.verify_gpu.clocks import describe_clocks
from mmvision_export.verify_gpu.findings import Finding, Findings, Status

__all__ = ["check_latency"]

_PART = "latency"
_WARM_UP, _RUNS = 10, 200
_PERCENTILES = (50, 90, 99)


def check_latency(
    engines: Sequence[BuiltEngine],
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Time launches that fill a bucket, from and to device memory."""
    for engine in engines:
        for bucket in engine.buckets:
            case = f"{engine.name}, {bucket}"
            if not budget.allows(_PART, case, findings):
                continue
            with findings.failure_is_a_finding(_PART, case):
                with contextlib.closing(opener(engine.path, options)) as backend:
                    times, clocks = _times_ms(backend, cuda, bucket)
                values = np.percentile(times, _PERCENTILES)
                numbers = {f"p{p}_ms": float(v) for p, v in zip(_PERCENTILES, values, strict=True)}
                numbers["runs"] = float(len(times))
                # What ran on the stand-in took the time of this CPU.
                status: Status = "launched" if findings.is_stand_in else "pass"
                findings.add(
                    Finding(part=_PART, case=case, status=status, numbers=numbers, detail=clocks)
                )
    cuda.close()


def _times_ms(backend: TensorRTBackend, cuda: Cuda, bucket: Profile) -> tuple[list[float], str]:
    """Milliseconds of each run, with the copies into and out of the engine's buffers, and clocks."""
    with (
        arrays_on_device(backend, cuda, bucket) as (source, target, stream),
        contextlib.ExitStack() as freed,
    ):
        first, last = (cuda.new_event(timing=True) for _ in range(2))
        for event in (first, last):
            freed.callback(cuda.free_event, event)
        times = []
        for run in range(_WARM_UP + _RUNS):
            cuda.record(first, stream)
            backend.run_into(target, source, stream=stream)
            cuda.record(last, stream)
            cuda.wait_here(last)
            if run >= _WARM_UP:
                times.append(cuda.elapsed_ms(first, last))
        # An idle GPU lowers its clocks: they are read while it works.
        for _ in range(_WARM_UP):
            backend.run_into(target, source, stream=stream)
        clocks = describe_clocks(cuda)
    return times, clocks
