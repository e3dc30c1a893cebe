"""What runs a model: one small class per runtime behind one protocol, and the choice between them.

| backend | runtime | opens |
| --- | --- | --- |
| `tensorrt`, `tensorrt-rtx` | TensorRT | an engine, or the one in a model directory that fits this GPU |
| `onnxruntime-rtx`, `onnxruntime-tensorrt`, `onnxruntime-cuda`, `onnxruntime-cpu` | ONNX Runtime | a model directory |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.runtime.backends.device_array import DeviceArray

__all__ = ["BACKENDS", "Backend", "BackendName", "BackendOptions", "DeviceBackend", "open_backend"]

BackendName = Literal[
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime-rtx",
    "onnxruntime-tensorrt",
    "onnxruntime-cuda",
    "onnxruntime-cpu",
]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""Fastest first: engines built ahead, then what builds them when it opens the graph, then kernel by kernel, then the
CPU. `auto` takes the first that works."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How a backend is opened; each uses what concerns it.

    Attributes:
        device: CUDA device.
        threads: Threads of the CPU backend; its own choice if None.
        streams: Calls that a TensorRT engine runs at once, each on a stream with memory of its own. ONNX Runtime takes
            calls of any number of threads whatever this says.
        cuda_graphs: Whether a TensorRT engine with buckets is run by CUDA graphs.
        capture_on_open: Whether those are captured when it is opened, rather than in the first call of each bucket.
        kernels: TensorRT-RTX's kernel strategy (`lazy`, `eager` or `none`), or None to choose.
        runtime_cache: TensorRT-RTX's file of compiled kernels, or None for one beside the engine.
        flavour: Which graph of a model directory the CPU backend runs, as `cpu-int8`; its best exact one if None.
        cpu_kernels: Whether the CPU backend uses the kernels of `mmvision build-plugins --cpu`, where there are any.

    Raises:
        BackendError: A number is out of range.
    """

    device: int = 0
    threads: int | None = None
    streams: int = 1
    cuda_graphs: bool = True
    capture_on_open: bool = False
    kernels: Any = None
    runtime_cache: Path | None = None
    flavour: str | None = None
    cpu_kernels: bool = True

    def __post_init__(self) -> None:
        for name in ("threads", "streams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BackendError(f"{name} must be at least 1, got {value}")


class Backend(Protocol):
    """A model loaded into one runtime. Safe for use by several threads.

    Attributes:
        name: Which runtime.
        config: The encoder's dimensions.
        dtype: Float type of `pixel_values` and `image_embeds`.
        profiles: Sizes of one launch, empty for any. A batch may have any number of images; each must fit one.
        info: Facts worth printing: files, versions, device.
    """

    name: BackendName
    config: EncoderConfig
    dtype: np.dtype[Any]
    profiles: Sequence[Profile]
    info: dict[str, Any]

    def run(
        self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        """Run one validated batch.

        Args:
            pixel_values: `[num_patches, patch_dim]` in `dtype`, C-contiguous.
            grid_thw: `[num_images, 3]`, C-contiguous.

        Returns:
            `[num_image_tokens, text_hidden_size]` in `dtype`, a new array.

        Raises:
            InputError: An image does not fit, or no cut of the batch does.
            BackendError: The runtime failed.
        """

    def close(self) -> None:
        """Free what is held. The backend cannot be used afterwards."""


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend that reads and writes device memory, and runs in a stream of the caller's.

    Attributes:
        device: Index of its CUDA device.
    """

    device: int

    def run_into(
        self,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        pixel_values: npt.NDArray[np.floating] | DeviceArray,
        grid_thw: npt.NDArray[np.int64],
        *,
        stream: int | None,
    ) -> None:
        """As `Backend.run`, filling an array.

        Args:
            image_embeds: `[num_image_tokens, text_hidden_size]` in `dtype`, filled.
            pixel_values: As for `run`.
            grid_thw: As for `run`.
            stream: Handle of a CUDA stream, or None for one of the backend's own. With one, and an array on the device
                to fill, it returns once the work is in the stream.
        """


def open_backend(name: str, path: Path, options: BackendOptions) -> Backend:
    """Load a model directory or an engine file into a runtime.

    Args:
        name: A backend, or `auto` for the first of `BACKENDS` that works. What was passed over, and why, is in
            `info["passed_over"]`.
        path: A model directory, or an `.engine` file.
        options: How.

    Raises:
        BackendError: The runtime is not installed, or does not work here.
        ManifestError: The files are missing, damaged, or not for this machine.
    """
    if path.is_file() and path.suffix != ".engine":
        raise BackendError(
            f"{path} is neither a model directory nor an .engine", hint="name the model directory"
        )
    if options.flavour is not None and name != "onnxruntime-cpu":
        raise BackendError(f"{name} takes no flavour", hint="choose --backend onnxruntime-cpu")
    if name == "auto":
        return _open_best(path, options)
    if name not in BACKENDS:
        raise BackendError(
            f"no such backend: {name}", hint=f"choose one of: auto, {', '.join(BACKENDS)}"
        )
    if name.startswith("tensorrt"):
        from mmvision_export.runtime.backends.engines import open_engine

        return open_engine(path, backend=name, options=options)
    if path.is_file():
        raise BackendError(f"{name} runs model directories, {path} is a file")
    from mmvision_export.runtime.backends.onnxruntime import CpuBackend
    from mmvision_export.runtime.backends.onnxruntime_gpu import (
        CudaBackend,
        RtxBackend,
        TensorRTProviderBackend,
    )

    classes = (CpuBackend, CudaBackend, TensorRTProviderBackend, RtxBackend)
    return {cls.name: cls for cls in classes}[name](path, options)


def _open_best(path: Path, options: BackendOptions) -> Backend:
    order = [name for name in BACKENDS if name.startswith("tensorrt") or not path.is_file()]
    passed_over: dict[str, str] = {}
    for name in order:
        try:
            backend = open_backend(name, path, options)
        except (BackendError, ManifestError) as error:
            passed_over[name] = str(error)
            if name == order[-1] and isinstance(error, ManifestError):
                raise  # the last resort works on every machine: if its files are wrong, that is the error
            continue
        backend.info["chosen"] = f"{name}: the first that works here of {', '.join(order)}"
        backend.info["passed_over"] = passed_over
        return backend
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(
        f"no backend can run {path} here: {reasons}", hint="see: mmvision doctor"
    ) from None
