"""Which engine of a model directory is opened, and with which class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmvision_export.artifacts.manifest import PLANS, Manifest, model_directory_of
from mmvision_export.core.errors import ManifestError
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend, import_tensorrt
from mmvision_export.runtime.backends.tensorrt_rtx import TensorRTRTXBackend

__all__ = ["open_engine"]


def open_engine(path: Path, *, backend: str, options: BackendOptions) -> TensorRTBackend:
    """Open an engine file, or the newest one of a model directory that fits this machine.

    Raises:
        BackendError: TensorRT, its Python package or a GPU is missing.
        ManifestError: There is no engine, or none that fits; the message says why for each.
    """
    module = import_tensorrt(backend)
    cuda = Cuda(options.device)
    if path.is_file():
        directory = model_directory_of(path)
        manifest = None if directory is None else Manifest.read(directory)
        return _opened(path, backend, module, cuda, manifest, options)

    manifest = Manifest.read(path)
    engines = sorted((path / PLANS).glob("*.engine"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not engines:
        raise ManifestError(
            f"{path / PLANS} holds no engine", hint="build one with: mmvision build-engine"
        )
    reasons: list[str] = []
    for engine in engines:
        try:
            return _opened(engine, backend, module, cuda, manifest, options)
        except ManifestError as error:
            reasons.append(str(error))
    raise ManifestError(
        "no engine fits this machine: " + "; ".join(reasons), hint="mmvision build-engine"
    )


def _opened(
    engine: Path,
    backend: str,
    module: Any,
    cuda: Cuda,
    manifest: Manifest | None,
    options: BackendOptions,
) -> TensorRTBackend:
    common: dict[str, Any] = {
        "module": module,
        "cuda": cuda,
        "manifest": manifest,
        "streams": options.streams,
        "cuda_graphs": options.cuda_graphs,
        "capture_on_open": options.capture_on_open,
    }
    if backend == "tensorrt":
        return TensorRTBackend(engine, **common)
    return TensorRTRTXBackend(
        engine, **common, kernels=options.kernels, runtime_cache=options.runtime_cache
    )
