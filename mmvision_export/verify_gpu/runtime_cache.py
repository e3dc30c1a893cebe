"""TensorRT-RTX's runtime cache: the first opening writes it, the second reads it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.tensorrt_rtx import default_runtime_cache
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, Opener, filling_batch, open_engine
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["check_runtime_cache"]

_PART = "runtime cache"


def check_runtime_cache(
    engines: Sequence[BuiltEngine],
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Open each engine of TensorRT-RTX twice, without the cache that other parts have left."""
    for engine in engines:
        if engine.record.backend != "tensorrt-rtx":
            continue
        if not budget.allows(_PART, engine.name, findings):
            continue
        with findings.failure_is_a_finding(_PART, engine.name):
            cache = options.runtime_cache or default_runtime_cache(engine.path)
            if cache is not None:
                Path(cache).unlink(missing_ok=True)
            said, numbers = [], {}
            for which in ("first", "second"):
                began = time.monotonic()
                with contextlib.closing(opener(engine.path, options)) as backend:
                    numbers[f"{which}_open_seconds"] = time.monotonic() - began
                    said.append(str(backend.info.runtime_cache).rpartition(": ")[2])
                    _, batch = filling_batch(backend, backend.profiles[0], seed=0)
                    backend.run(batch)
            failures = [] if said == ["new", "read"] else [f"the cache was {', then '.join(said)}"]
            findings.judge(_PART, engine.name, failures, numbers)
