"""Do opening, closing and calling leave anything behind: device memory, handles, open files?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, Opener, filling_batch, open_engine
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["HANDLES", "Held", "check_leaks", "held_now"]

_PART = "leaks"
_OPENS, _CALLS = 5, 100
_GRANULE_BYTES = 2 << 20  # cuMemAlloc takes memory from the device in pieces of 2 MiB

HANDLES = {
    "cuMemAlloc_v2": "cuMemFree_v2",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuStreamCreate": "cuStreamDestroy_v2",
    "cuEventCreate": "cuEventDestroy_v2",
    "cuStreamEndCapture": "cuGraphDestroy",
    "cuGraphInstantiateWithFlags": "cuGraphExecDestroy",
    "cuModuleLoadData": "cuModuleUnload",
}
"""What makes a handle -> what frees it."""


@dataclasses.dataclass(frozen=True)
class Held:
    """What this process and device hold at a moment.

    Attributes:
        device_bytes: Of the device's memory, by anybody.
        handles: That our code made by the driver and did not free.
        files: Open file descriptors; None where the system does not list them.
    """

    device_bytes: int
    handles: int
    files: int | None


def held_now(cuda: Cuda) -> Held:
    """Ask the driver, our count of its calls, and the system."""
    cuda.use()
    calls = cuda.driver.calls
    handles = sum(calls[made] - calls[freed] for made, freed in HANDLES.items())
    listed = Path("/proc/self/fd")
    files = len(list(listed.iterdir())) if listed.is_dir() else None
    return Held(cuda.memory_bytes() - cuda.free_bytes(), handles, files)


def check_leaks(
    engines: Sequence[BuiltEngine],
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Open, call and close each engine again and again, after once that is not counted.

    The first time CUDA and TensorRT load what they keep. On an integrated GPU the device's memory
    is the host's, of which everybody takes: it is shown there and not judged.
    """
    for engine in engines:
        if not budget.allows(_PART, engine.name, findings):
            continue
        with findings.failure_is_a_finding(_PART, engine.name):
            _cycle(engine, 1, options, opener)
            before, opens = held_now(cuda), 0
            while opens < _OPENS and not (opens > 1 and budget.is_spent(_PART)):
                _cycle(engine, _CALLS // _OPENS, options, opener)
                opens += 1
            after = held_now(cuda)
            numbers: dict[str, float] = {
                "opens": opens,
                "calls": opens * (_CALLS // _OPENS),
                "device_bytes_more": after.device_bytes - before.device_bytes,
                "handles_more": after.handles - before.handles,
            }
            if before.files is not None and after.files is not None:
                numbers["files_more"] = after.files - before.files
            judged = {"handles_more": 0, "files_more": 0}
            if not cuda.is_integrated():
                judged["device_bytes_more"] = _GRANULE_BYTES
            failures = [
                f"{name} is above {most}"
                for name, most in judged.items()
                if numbers.get(name, 0) > most
            ]
            findings.judge(_PART, engine.name, failures, numbers)
    cuda.close()


def _cycle(engine: BuiltEngine, calls: int, options: BackendOptions, opener: Opener) -> None:
    with contextlib.closing(opener(engine.path, options)) as backend:
        sizes = engine.record.profiles
        for call in range(calls):
            _, batch = filling_batch(backend, sizes[call % len(sizes)], seed=0)
            backend.run(batch)
