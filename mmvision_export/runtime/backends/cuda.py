"""One CUDA device: its memory, streams, events and graphs, by the driver alone.

No wheel and no torch: `libcuda.so.1` is all that an engine needs beside TensorRT. The context is
the device's primary one, which TensorRT's and torch's runtime API use too, so that addresses and
streams are the same for all three.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda_driver import CudaDriver, NoGpuError

__all__ = ["LEGACY_STREAM", "Cuda", "current_compute_capability", "current_gpu"]

LEGACY_STREAM = 1
"""The default stream, which waits for all blocking streams, by the name (`CU_STREAM_LEGACY`) that
DLPack has for it too. Its other name is 0, which DLPack forbids."""

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS = 75, 76, 18, 16  # CU_DEVICE_ATTRIBUTE_...


class Cuda:
    """One device.

    Its primary context is held from the first `use` to `close`, after which it can be used again.

    Args:
        device: Its index.
        driver: This machine's if None.

    Raises:
        NoGpuError: There is no GPU.
        BackendError: The driver does not work, or there is no such device.
    """

    def __init__(self, device: int, driver: CudaDriver | None = None) -> None:
        self.driver = driver or CudaDriver.found()
        self.device = device
        count = self._integer("cuDeviceGetCount")
        if count == 0:
            raise NoGpuError("the CUDA driver sees no GPU", hint="CUDA_VISIBLE_DEVICES may hide it")
        if not 0 <= device < count:
            raise BackendError(
                f"there is no CUDA device {device}: this machine has {count}",
                hint="devices are counted from 0",
            )
        self._ordinal = self._integer("cuDeviceGet", device)
        self._context: int | None = None
        self._lock = threading.Lock()

    def use(self) -> None:
        """Make this the calling thread's device."""
        with self._lock:
            if self._context is None:
                self._context = self.driver.new("cuDevicePrimaryCtxRetain", self._ordinal)
            context = self._context
        self.driver.call("cuCtxSetCurrent", context)

    def close(self) -> None:
        """Let the context go.

        It ends with its last holder. All that was made in it must be freed.
        """
        with self._lock:
            held, self._context = self._context, None
        if held is not None:
            self.driver.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    def name(self) -> str:
        """The device's, as `NVIDIA H100`."""
        text = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", text, len(text), self._ordinal)
        return text.value.decode(errors="replace")

    def memory_bytes(self) -> int:
        """All of the device's."""
        size = ctypes.c_size_t()
        self.driver.call("cuDeviceTotalMem_v2", size, self._ordinal)
        return size.value

    def free_bytes(self) -> int:
        """What is free of the device's memory now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.driver.call("cuMemGetInfo_v2", free, total)
        return free.value

    def compute_capability(self) -> ComputeCapability:
        """The device's."""
        return ComputeCapability(self.attribute(_MAJOR), self.attribute(_MINOR))

    def gpu(self) -> Gpu:
        """The device, as records name it."""
        return Gpu(
            name=self.name(),
            compute_capability=self.compute_capability(),
            multiprocessors=self.attribute(_MULTIPROCESSORS),
            memory_bytes=self.memory_bytes(),
        )

    def is_integrated(self) -> bool:
        """Whether it shares the host's memory, as a Jetson's does."""
        return bool(self.attribute(_INTEGRATED))

    def attribute(self, number: int) -> int:
        """A CUdevice_attribute."""
        return self._integer("cuDeviceGetAttribute", number, self._ordinal)

    def _integer(self, symbol: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self.driver.call(symbol, value, *arguments)
        return value.value

    def new_stream(self) -> int:
        """A new stream's handle; free it with `free_stream`.

        It does not wait for the default stream, nor that for it. A capture on a stream that did
        would be broken by whatever another thread puts into the default stream meanwhile.
        """
        return self.driver.new("cuStreamCreate", _NON_BLOCKING)

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self.driver.call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; errors of asynchronous work appear here."""
        self.driver.call("cuStreamSynchronize", stream)

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory; free it with `free`."""
        return self.driver.new("cuMemAlloc_v2", size_bytes)

    def free(self, address: int) -> None:
        """Free device memory."""
        self.driver.call("cuMemFree_v2", address)

    def allocate_pinned(self, size_bytes: int) -> int:
        """Address of new host memory that the device can read by itself.

        Free it with `free_pinned`.
        """
        return self.driver.new("cuMemHostAlloc", size_bytes, 0)

    def free_pinned(self, address: int) -> None:
        """Free host memory of `allocate_pinned`."""
        self.driver.call("cuMemFreeHost", address)

    def to_device(self, address: int, array: npt.NDArray[Any], stream: int) -> None:
        """Copy a C-contiguous array to device memory, in stream order.

        The array must stay as it is until the stream has come that far: a device that reads the
        host's memory by itself reads it then.
        """
        self.driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def to_host(self, array: npt.NDArray[Any], address: int, stream: int) -> None:
        """Copy device memory to a C-contiguous array, in stream order."""
        self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy device memory to device memory, in stream order."""
        self.driver.call("cuMemcpyDtoDAsync_v2", target, source, size_bytes, stream)

    def zero(self, address: int, size_bytes: int, stream: int) -> None:
        """Fill device memory with zero bytes, in stream order."""
        self.driver.call("cuMemsetD8Async", address, 0, size_bytes, stream)

    def new_event(self, *, timing: bool = False) -> int:
        """A new event's handle; free it with `free_event`."""
        return self.driver.new("cuEventCreate", 0 if timing else _NO_TIMING)

    def free_event(self, event: int) -> None:
        """Destroy an event."""
        self.driver.call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """Let an event stand for all that is in a stream now."""
        self.driver.call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait for what an event stands for; nothing if it was never recorded."""
        self.driver.call("cuStreamWaitEvent", stream, event, 0)

    def wait_here(self, event: int) -> None:
        """Let the calling thread wait for what an event stands for.

        Not at all if never recorded.
        """
        self.driver.call("cuEventSynchronize", event)

    def elapsed_ms(self, first: int, last: int) -> float:
        """Milliseconds between two events with timing, both of which have happened."""
        elapsed = ctypes.c_float()
        self.driver.call("cuEventElapsedTime", elapsed, first, last)
        return elapsed.value

    def captured(self, enqueue: Callable[[], None], stream: int) -> int:
        """A CUDA graph of what is enqueued, ready to launch.

        Nothing of it is run. Free it with `free_graph`.

        Args:
            enqueue: Puts work into the stream. It must not allocate, synchronise or use other
                streams, and every address in it must stay as it is for as long as the graph is
                launched.
            stream: Not the default stream.
        """
        self.driver.call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to report
                self.driver.call("cuGraphDestroy", self._end_capture(stream))
            raise
        with contextlib.ExitStack() as failed:
            graph = self._end_capture(stream)
            try:
                executable = self.driver.new("cuGraphInstantiateWithFlags", graph, 0)
                failed.callback(self.free_graph, executable)
            finally:
                self.driver.call("cuGraphDestroy", graph)
            failed.pop_all()
        return executable

    def _end_capture(self, stream: int) -> int:
        graph = ctypes.c_void_p()
        self.driver.call("cuStreamEndCapture", stream, graph)
        return graph.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph, in stream order."""
        self.driver.call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self.driver.call("cuGraphExecDestroy", graph)


def current_compute_capability(device: int = 0) -> ComputeCapability | None:
    """This machine's, or None where there is no GPU.

    Raises:
        BackendError: There may be one, but the driver is too old, a stub, or does not work.
    """
    try:
        return Cuda(device).compute_capability()
    except NoGpuError:
        return None


def current_gpu(device: int = 0) -> Gpu | None:
    """A GPU of this machine, or None where there is none at all.

    Raises:
        BackendError: There is no such device, or there may be one, but the driver is too old, a stub,
            or does not work.
    """
    try:
        return Cuda(device).gpu()
    except NoGpuError:
        return None
