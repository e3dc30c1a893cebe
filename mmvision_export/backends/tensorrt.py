"""TensorRT and TensorRT-RTX engines.

Written against the API that both share (TensorRT 10.0 and later). On the machines this project is developed on there is
no GPU: the calls are checked against type stubs and driven through a stand-in that enforces TensorRT's rules.
"""

from __future__ import annotations

import contextlib
import importlib
import platform as host
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.backends import BackendName
from mmvision_export.backends.cuda import Cuda, DeviceBuffer
from mmvision_export.errors import BackendError, ManifestError
from mmvision_export.manifest import PLANS, Manifest, model_directory_of
from mmvision_export.sidecar import EngineRecord, Profile, refuse_foreign_engine

__all__ = ["TENSORRT_MODULES", "TensorRTBackend", "current_platform", "import_tensorrt", "open_engine"]

TENSORRT_MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module."""

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def import_tensorrt(backend: str) -> Any:
    """The module of a TensorRT backend.

    Raises:
        BackendError: It is not installed, or its libraries cannot be loaded.
    """
    name = TENSORRT_MODULES[backend]
    hint = f"pip install '.[{_EXTRAS[backend]}]'"
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} cannot be imported: {error}", hint=hint) from error
    if not hasattr(module, "Runtime"):  # a folder of that name, such as type stubs bring
        raise BackendError(f"{name} is not installed", hint=hint)
    return module


def current_platform() -> str:
    """This machine as engines name it: `linux-x86_64`."""
    return f"{host.system().lower()}-{host.machine().lower()}"


def open_engine(path: Path, *, backend: str, device: int) -> TensorRTBackend:
    """Open an engine file, or the newest one of a model directory that fits this machine.

    Raises:
        BackendError: TensorRT, its Python package or a GPU is missing.
        ManifestError: There is no engine, or none that fits; the message says why for each.
    """
    trt = import_tensorrt(backend)
    cuda = Cuda(device)
    if path.is_file():
        directory = model_directory_of(path)
        manifest = None if directory is None else Manifest.read(directory)
        return TensorRTBackend(path, backend=backend, trt=trt, cuda=cuda, manifest=manifest)

    manifest = Manifest.read(path)
    engines = sorted((path / PLANS).glob("*.engine"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not engines:
        raise ManifestError(f"{path / PLANS} holds no engine", hint="build one with: mmvision build-engine")
    reasons: list[str] = []
    for engine in engines:
        try:
            return TensorRTBackend(engine, backend=backend, trt=trt, cuda=cuda, manifest=manifest)
        except ManifestError as error:
            reasons.append(str(error))
    raise ManifestError("no engine fits this machine: " + "; ".join(reasons), hint="mmvision build-engine")


class TensorRTBackend:
    """One engine with one execution context and one stream. Not safe for use by several threads at once. See `Backend`.

    Raises:
        ManifestError: The engine is not for this machine or graph.
        BackendError: TensorRT or CUDA refused a step.
    """

    def __init__(self, engine: Path, *, backend: str, trt: Any, cuda: Cuda, manifest: Manifest | None) -> None:
        record = EngineRecord.read(engine)
        compute_capability = cuda.compute_capability()
        refuse_foreign_engine(
            engine,
            record,
            backend=backend,
            tensorrt_version=str(trt.__version__),
            compute_capability=compute_capability,
            platform=current_platform(),
            manifest=manifest,
        )
        self.name: BackendName = "tensorrt-rtx" if backend == "tensorrt-rtx" else "tensorrt"
        self.config = record.config
        self.profile: Profile | None = record.profile
        # NumPy has no bfloat16: a bf16 graph takes and gives float32.
        self.dtype: np.dtype[Any] = np.dtype(np.float16 if record.precision == "fp16" else np.float32)
        self.info: dict[str, Any] = {
            "engine": str(engine),
            "precision": record.precision,
            "attention": record.attention,
            "tensorrt": record.tensorrt_version,
            "compute_capability": compute_capability,
        }
        self._cuda = cuda
        self._engine: Any = None
        self._context: Any = None
        self._cleanup = contextlib.ExitStack()
        try:
            self._open(engine, trt)
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to report
                self.close()
            raise

    def _open(self, engine: Path, trt: Any) -> None:
        self._logger = _logger(trt)
        runtime = _checked(trt.Runtime(self._logger), "create a runtime", self._logger)
        self._engine = _checked(
            runtime.deserialize_cuda_engine(engine.read_bytes()), f"deserialise {engine}", self._logger
        )
        self._context = _checked(self._engine.create_execution_context(), "create a context", self._logger)
        self._stream = self._cuda.new_stream()
        self._cleanup.callback(self._cuda.free_stream, self._stream)
        self._buffers = {name: DeviceBuffer(self._cuda) for name in ("pixel_values", "grid_thw", "image_embeds")}
        for buffer in self._buffers.values():
            self._cleanup.callback(buffer.free)
        _checked(self._context.set_optimization_profile_async(0, self._stream), "select profile 0", self._logger)
        self._cuda.synchronize(self._stream)

    def run(self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """See `Backend.run`."""
        if self._context is None:
            raise BackendError("the encoder is closed")
        self._cuda.use()
        tokens = len(pixel_values) // self.config.patches_per_token
        image_embeds = np.empty((tokens, self.config.text_hidden_size), dtype=self.dtype)
        for name, array in (("pixel_values", pixel_values), ("grid_thw", grid_thw)):
            _checked(
                self._context.set_input_shape(name, tuple(array.shape)),
                f"accept {name} of shape {list(array.shape)}",
                self._logger,
            )
            self._cuda.to_device(self._buffers[name].reserve(array.nbytes), array, self._stream)
        self._buffers["image_embeds"].reserve(image_embeds.nbytes)
        for name, buffer in self._buffers.items():
            address = buffer.address
            _checked(self._context.set_tensor_address(name, address), f"take the address of {name}", self._logger)
        _checked(self._context.execute_async_v3(self._stream), "enqueue the engine", self._logger)
        self._cuda.to_host(image_embeds, self._buffers["image_embeds"].address, self._stream)
        self._cuda.synchronize(self._stream)
        return image_embeds

    def close(self) -> None:
        """See `Backend.close`."""
        # TensorRT asks that a context go before its engine.
        self._context = None
        self._engine = None
        self._cleanup.close()


def _logger(trt: Any) -> Any:
    """A TensorRT logger that keeps the errors, for the message of the exception that follows."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _checked(result: Any, what: str, logger: Any) -> Any:
    """Turn TensorRT's None or False into an error with what it logged."""
    if result is None or result is False:
        reason = "; ".join(logger.errors) or "it gave no reason"
        logger.errors.clear()
        raise BackendError(f"TensorRT could not {what}: {reason}", hint="see: mmvision doctor")
    return result
