"""The machine: GPU, driver, versions. What a page that is sent back begins with."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.cuda_driver import cuda_version_text
from mmvision_export.runtime.backends.cuda_versions import describe_driver

__all__ = ["is_stand_in", "machine_facts"]

_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
# Of the installed packages, those whose name has one of these in it.
_WORDS = ("tensorrt", "onnx", "torch", "triton", "numpy", "nvidia", "cuda", "cupy", "polygraphy")


def is_stand_in(cuda: Cuda) -> bool:
    """Whether the driver is the one of `plugins/tests`, which computes nothing."""
    return cuda.driver.has("fakeReport")


def machine_facts(cuda: Cuda) -> dict[str, Any]:
    """Facts by name, as JSON values."""
    cuda.use()
    return {
        "driver": describe_driver(cuda),
        "driver_cuda": cuda_version_text(cuda.driver.version),
        "gpu": cuda.name(),
        "compute_capability": str(cuda.compute_capability()),
        "multiprocessors": cuda.attribute(_MULTIPROCESSORS),
        "integrated": cuda.is_integrated(),
        "memory_bytes": cuda.memory_bytes(),
        "free_bytes_before": cuda.free_bytes(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": _packages(),
    }


def _packages() -> dict[str, str]:
    found = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if any(word in name.lower() for word in _WORDS):
            found[name] = package.version
    return dict(sorted(found.items()))
