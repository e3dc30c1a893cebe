"""Every bucket captured as a CUDA graph and replayed: bit for bit what the first launch gave."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from mmvision_export.artifacts.profile import Profile
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import (
    BuiltEngine,
    Opener,
    filling_batch,
    open_engine,
    same_bits,
)
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["check_captures"]

_PART = "captures"


def check_captures(
    engines: Sequence[BuiltEngine],
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Capture and replay each bucket of each engine.

    A refused capture costs no result, so that only `info` tells of it; here it fails.
    """
    for engine in engines:
        if not engine.buckets:
            continue
        if not budget.allows(_PART, engine.name, findings):
            continue
        with (
            findings.failure_is_a_finding(_PART, engine.name),
            contextlib.closing(opener(engine.path, options)) as backend,
        ):
            for bucket in engine.buckets:
                case = f"{engine.name}, {bucket}"
                with findings.failure_is_a_finding(_PART, case):
                    failures = _replayed(backend, bucket)
                    refused = backend.info.captures_refused or {}
                    reason = refused.get(str(bucket))
                    if reason is not None:
                        failures.append(f"the capture was refused: {reason}")
                    findings.judge(_PART, case, failures, {})


def _replayed(backend: TensorRTBackend, bucket: Profile) -> list[str]:
    """What was wrong with replays of a bucket's graph.

    Other patches go through the same graph in between: a replay that runs nothing leaves the first
    result where it is.
    """
    _, batch = filling_batch(backend, bucket, seed=0)
    _, other = filling_batch(backend, bucket, seed=1)
    first, again = backend.run(batch), backend.run(batch)
    of_other, back = backend.run(other), backend.run(batch)
    failures = []
    if not np.isfinite(first).all():
        failures.append("the first result is not finite")
    for name, result in (("second", again), ("fourth", back)):
        if not same_bits(result, first):
            failures.append(f"the {name} result is not that of the first launch, bit for bit")
    if same_bits(of_other, first):
        failures.append("other patches gave the same result")
    return failures
