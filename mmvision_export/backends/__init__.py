"""What runs a model: one small class per runtime behind one protocol, and the choice between them.

| backend | runtime | opens |
| --- | --- | --- |
| `onnxruntime-cpu`, `onnxruntime-cuda` | ONNX Runtime | a model directory |
| `tensorrt`, `tensorrt-rtx` | TensorRT | an engine, or the one in a model directory that fits this GPU |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from mmvision_export.config import EncoderConfig
from mmvision_export.errors import BackendError, ManifestError
from mmvision_export.sidecar import Profile

__all__ = ["BACKENDS", "Backend", "BackendName", "open_backend"]

BackendName = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


class Backend(Protocol):
    """A model loaded into one runtime.

    Attributes:
        name: Which runtime.
        config: The encoder's dimensions.
        dtype: Float type of `pixel_values` and `image_embeds`.
        profile: Sizes it accepts, or None for any.
        info: Facts worth printing: files, versions, device.
    """

    name: BackendName
    config: EncoderConfig
    dtype: np.dtype[Any]
    profile: Profile | None
    info: dict[str, Any]

    def run(self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """Run one validated batch.

        Args:
            pixel_values: `[num_patches, patch_dim]` in `dtype`, C-contiguous.
            grid_thw: `[num_images, 3]`, C-contiguous.

        Returns:
            `[num_image_tokens, text_hidden_size]` in `dtype`, a new array.

        Raises:
            BackendError: The runtime failed.
        """

    def close(self) -> None:
        """Free what is held. The backend cannot be used afterwards."""


def open_backend(name: str, path: Path, *, device: int, threads: int | None, flavour: str | None = None) -> Backend:
    """Load a model directory or an engine file into a runtime.

    Args:
        name: A backend, or `auto` for the fastest that works: an engine that fits this GPU, then ONNX Runtime on a GPU,
            then on the CPU. What was passed over, and why, is in `info["passed_over"]`.
        path: A model directory, or an `.engine` file.
        device: CUDA device.
        threads: Threads of the CPU backend; its own choice if None.
        flavour: Which graph of a model directory the CPU backend runs, as `cpu-int8`; `model.onnx` if None.

    Raises:
        BackendError: The runtime is not installed, or does not work here.
        ManifestError: The files are missing, damaged, or not for this machine.
    """
    if path.is_file() and path.suffix != ".engine":
        raise BackendError(f"{path} is neither a model directory nor an .engine", hint="name the model directory")
    if flavour is not None and name != "onnxruntime-cpu":
        raise BackendError(f"{name} takes no flavour", hint="choose --backend onnxruntime-cpu")
    if name == "auto":
        return _open_best(path, device=device, threads=threads)
    if name not in BACKENDS:
        raise BackendError(f"no such backend: {name}", hint=f"choose one of: auto, {', '.join(BACKENDS)}")
    if name.startswith("tensorrt"):
        from mmvision_export.backends.tensorrt import open_engine

        return open_engine(path, backend=name, device=device)
    if path.is_file():
        raise BackendError(f"{name} runs model directories, {path} is a file")
    from mmvision_export.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, name=name, device=device, threads=threads, flavour=flavour)


def _open_best(path: Path, *, device: int, threads: int | None) -> Backend:
    order: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu")
    if path.is_file():
        order = ("tensorrt", "tensorrt-rtx")
    passed_over: dict[str, str] = {}
    for name in order:
        try:
            backend = open_backend(name, path, device=device, threads=threads)
        except (BackendError, ManifestError) as error:
            passed_over[name] = str(error)
            if name == order[-1] and isinstance(error, ManifestError):
                raise  # the last resort works on every machine: if its files are wrong, that is the error
            continue
        backend.info["passed_over"] = passed_over
        return backend
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(f"no backend can run {path} here: {reasons}", hint="see: mmvision doctor") from None
