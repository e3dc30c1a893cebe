"""The few CUDA runtime calls an engine needs, each checked where it is made.

Through NVIDIA's `cuda-bindings`, so that running an engine needs no torch.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError

__all__ = ["Cuda", "current_compute_capability"]


class Cuda:
    """One device of the CUDA runtime.

    Raises:
        BackendError: `cuda-bindings` is not installed, or there is no driver or no such device.
    """

    def __init__(self, device: int, runtime: Any = None) -> None:
        if runtime is None:
            try:
                runtime = importlib.import_module("cuda.bindings.runtime")
            except ImportError as error:
                raise BackendError(
                    f"cuda-bindings is not installed: {error}",
                    hint="pip install '.[tensorrt]' (or [rtx])",
                ) from error
        self._runtime = runtime
        self.device = device
        count = int(self._call("cudaGetDeviceCount"))
        if not 0 <= device < count:
            raise BackendError(f"there is no CUDA device {device}: this machine has {count}")
        self.use()

    def use(self) -> None:
        """Make this the calling thread's device."""
        self._call("cudaSetDevice", self.device)

    def compute_capability(self) -> ComputeCapability:
        """The device's."""
        attribute = self._runtime.cudaDeviceAttr
        major = self._call(
            "cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.device
        )
        minor = self._call(
            "cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.device
        )
        return ComputeCapability(int(major), int(minor))

    def new_stream(self) -> int:
        """A new stream's handle; free it with `free_stream`."""
        return int(self._call("cudaStreamCreate"))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; errors of asynchronous work appear here."""
        self._call("cudaStreamSynchronize", stream)

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory; free it with `free`."""
        return int(self._call("cudaMalloc", size_bytes))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def to_device(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        """Copy a C-contiguous array to device memory, in stream order; it may change once this returns."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Copy device memory to a C-contiguous array, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy device memory to device memory, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def zero(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill device memory with zero bytes, in stream order."""
        self._call("cudaMemsetAsync", address, 0, size_bytes, stream)

    def new_event(self) -> int:
        """A new event's handle; free it with `free_event`."""
        flags = self._runtime.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def free_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Let an event stand for all that is in a stream now."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait for what an event stands for; nothing if it was never recorded."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def captured(self, enqueue: Callable[[], None], stream: int) -> int:
        """A CUDA graph of what is enqueued, ready to launch; nothing of it is run. Free it with `free_graph`.

        Args:
            enqueue: Puts work into the stream. It must not allocate, synchronise or use other streams, and every
                address in it must stay as it is for as long as the graph is launched.
            stream: Not the default stream.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to report
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", stream))
            raise
        with contextlib.ExitStack() as failed:
            graph = self._call("cudaStreamEndCapture", stream)
            try:
                executable = int(self._call("cudaGraphInstantiate", graph, 0))
                failed.callback(self.free_graph, executable)
            finally:
                self._call("cudaGraphDestroy", graph)
            failed.pop_all()
        return executable

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph, in stream order."""
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            status, *results = getattr(self._runtime, function)(*arguments)
        except (
            RuntimeError
        ) as error:  # raised instead of a status when libcudart or the driver cannot be loaded
            raise BackendError(
                f"{function} failed: {error}", hint="see: mmvision doctor"
            ) from error
        if int(status) != 0:
            _, name = self._runtime.cudaGetErrorName(status)
            _, text = self._runtime.cudaGetErrorString(status)
            parts = [
                part.decode() if isinstance(part, bytes) else str(part) for part in (name, text)
            ]
            raise BackendError(
                f"{function} failed with {parts[0]}: {parts[1]}", hint="see: mmvision doctor"
            )
        return results[0] if results else None


def current_compute_capability(device: int = 0) -> ComputeCapability | None:
    """This machine's, or None where there is no usable GPU."""
    try:
        return Cuda(device).compute_capability()
    except BackendError:
        return None
