"""Arrays on the device, in a stream of the caller's: bit for bit what host arrays give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

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
    encoder_from_backend,
    filling_batch,
    open_engine,
    same_bits,
)
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["check_arrays", "import_torch"]

_PART = "arrays"


def import_torch() -> Any:
    """Give torch with CUDA, or a string that says why not. It is no part of what is deployed."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return torch if torch.cuda.is_available() else "torch is installed and sees no GPU"


def check_arrays(
    engines: Sequence[BuiltEngine],
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Give each engine the same patches on the host, in device memory, and as torch's tensors."""
    torch = import_torch()
    for engine in engines:
        if not budget.allows(_PART, engine.name, findings):
            continue
        size = engine.largest
        with (
            findings.failure_is_a_finding(_PART, engine.name),
            contextlib.closing(opener(engine.path, options)) as backend,
        ):
            _, batch = filling_batch(backend, size, seed=0)
            host = backend.run(batch)
            case = f"{engine.name}, own stream"
            with findings.failure_is_a_finding(_PART, case):
                given = _through_the_device(backend, cuda, size)
                findings.judge(_PART, case, _differences(given, host), {})
            case = f"{engine.name}, torch"
            if isinstance(torch, str):
                findings.not_run(_PART, case, torch)
                continue
            with findings.failure_is_a_finding(_PART, case):
                failures = []
                for given in _through_torch(torch, backend, size):
                    failures += _differences(given, host)
                findings.judge(_PART, case, failures, {})
    cuda.close()


def _differences(given: np.ndarray, host: np.ndarray) -> list[str]:
    if same_bits(given, host):
        return []
    return ["the embeddings are not those of host arrays, bit for bit"]


def _through_the_device(backend: TensorRTBackend, cuda: Cuda, profile: Profile) -> np.ndarray:
    with arrays_on_device(backend, cuda, profile) as (source, target, stream):
        backend.run_into(target, source, stream=stream)
        result = np.empty(target.shape, target.dtype)
        cuda.to_host(result, target.address, stream)
        cuda.synchronize(stream)
    return result


def _through_torch(torch: Any, backend: TensorRTBackend, profile: Profile) -> list[np.ndarray]:
    """In the current stream, and in one that is not the default one."""
    pixels, batch = filling_batch(backend, profile, seed=0)
    encoder = encoder_from_backend(backend)  # not closed: the backend is the caller's
    device = f"cuda:{backend.device}"
    results = []
    for stream in (torch.cuda.current_stream(device), torch.cuda.Stream(device)):
        with torch.cuda.stream(stream):
            given = torch.from_numpy(pixels).to(device, getattr(torch, backend.dtype.name))
            grid = torch.from_numpy(batch.grid.rows)
            result = encoder(given, grid, stream=stream)
            results.append(result.cpu().numpy())
    return results
