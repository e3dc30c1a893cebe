"""Which CUDA the driver has and which TensorRT was made with: the second must not be newer."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.cuda_driver import cuda_version_text

__all__ = ["describe_driver", "refuse_newer_cuda", "tensorrt_cuda"]

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
_MODULE_VERSION = Path("/proc/driver/nvidia/version")


def tensorrt_cuda(backend: str) -> tuple[str, int] | None:
    """The installed package of a TensorRT backend and its CUDA major: `tensorrt-cu13`, 13.

    Returns:
        None where no package of pip says it, as with JetPack's TensorRT, which fits JetPack's
        driver.
    """
    for major in (13, 12, 11):
        name = f"{_PACKAGES[backend]}-cu{major}"
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name, major
    return None


def refuse_newer_cuda(cuda: Cuda, backend: str) -> None:
    """Raise `BackendError` if a backend's TensorRT is of a later CUDA than the driver.

    References:
        https://docs.nvidia.com/deploy/cuda-compatibility: within a major version a driver runs what any
        minor version made, of a later major version it runs nothing.
    """
    made_with = tensorrt_cuda(backend)
    driver = cuda.driver.version
    if made_with is not None and made_with[1] > driver // 1000:
        package, major = made_with
        raise BackendError(
            f"the driver is too old for {package}: it has CUDA {cuda_version_text(driver)}, "
            f"and CUDA {major} is needed",
            hint=f"install a newer driver, or {_PACKAGES[backend]}-cu{driver // 1000}",
        )


def describe_driver(cuda: Cuda) -> str:
    """`535.183 for CUDA 12.2, NVIDIA A10 (compute capability 8.6, 22.5 GB)`."""
    kind = "integrated, " if cuda.is_integrated() else ""
    return (
        f"{_module_version()}for CUDA {cuda_version_text(cuda.driver.version)}, {cuda.name()} "
        f"({kind}compute capability {cuda.compute_capability()}, {cuda.memory_bytes() / 1e9:.1f} GB)"
    )


def _module_version() -> str:
    """Of the kernel module, with a space behind it.

    Nothing where it does not say, as on a Jetson.
    """
    try:
        text = _MODULE_VERSION.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"Module\s+(?:for \S+\s+)?(\d+\.[\d.]+)", text)
    return "" if found is None else f"{found[1]} "
