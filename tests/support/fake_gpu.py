"""A stand-in for TensorRT and the CUDA runtime that enforces their rules at the API's boundary.

No kernel runs: an "engine" computes a number per token from what is in device memory when the work runs, enough to see
that the right bytes went to the right address in the right order. What TensorRT or CUDA leave undefined fails here: an
address or shape or profile not set, memory too small, a stream or graph that does not exist, an allocation, a
synchronisation or another stream during a capture, a capture of a context that has not run in its shape, a graph whose
memory is gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np


class Status(int):
    """A CUDA status."""


class Runtime:
    """`cuda.bindings.runtime`, as far as it is used. `fail` names a call that shall return an error."""

    cudaEventDisableTiming = 2

    class cudaDeviceAttr:
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1) -> None:
        self.capability = capability
        self.devices = devices
        self.fail: str | None = None
        self.memory: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.events: dict[int, int | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.capturing: tuple[int, list[Callable[[], None]]] | None = None
        self.log: list[str] = []
        self._next = 1 << 20

    def holds_nothing(self) -> bool:
        """Whether all that was made has been freed."""
        return not (
            self.memory
            or self.streams
            or self.events
            or self.graphs
            or self.executables
            or self.capturing
        )

    def _status(self, call: str) -> Status:
        self.log.append(call)
        return Status(2 if call == self.fail else 0)

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Run at once, or put into the graph being captured."""
        assert stream in self.streams, "no such stream"
        if self.capturing is None:
            work()
            return
        assert stream == self.capturing[0], "another stream during a capture"
        self.capturing[1].append(work)

    def region(self, address: int, size: int) -> np.ndarray:
        """Device memory from an address on."""
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + len(memory):
                return memory[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not device memory")

    def _not_while_capturing(self) -> None:
        assert self.capturing is None, "not allowed during a capture"

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return self._status("cudaGetDeviceCount"), self.devices

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (self._status("cudaSetDevice"),)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        return self._status("cudaDeviceGetAttribute"), self.capability[attribute - 75]

    def cudaStreamCreate(self) -> tuple[Status, int]:
        self._not_while_capturing()
        status, handle = self._status("cudaStreamCreate"), self._handle()
        if not status:
            self.streams.add(handle)
        return status, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.remove(stream)
        return (self._status("cudaStreamDestroy"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        self._not_while_capturing()
        assert stream in self.streams
        return (self._status("cudaStreamSynchronize"),)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        status, handle = self._status("cudaEventCreateWithFlags"), self._handle()
        if not status:
            self.events[handle] = None
        return status, handle

    def cudaEventDestroy(self, event: int) -> tuple[Status]:
        del self.events[event]
        return (self._status("cudaEventDestroy"),)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Status]:
        assert stream in self.streams
        self._not_while_capturing()
        self.events[event] = stream
        return (self._status("cudaEventRecord"),)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Status]:
        assert stream in self.streams
        assert event in self.events
        self._not_while_capturing()
        return (self._status("cudaStreamWaitEvent"),)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        self._not_while_capturing()
        assert size > 0
        status = self._status("cudaMalloc")
        address = 0
        if not status:
            memory = np.full(size, 0xFF, dtype=np.uint8)  # NaN in every float type
            address = memory.ctypes.data
            self.memory[address] = memory
        return status, address

    def cudaFree(self, address: int) -> tuple[Status]:
        self._not_while_capturing()
        del self.memory[address]  # KeyError: freed twice, or never allocated
        return (self._status("cudaFree"),)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Status]:
        status = self._status("cudaMemcpyAsync")

        def copy() -> None:
            for address, on_device in ((target, kind != 2), (source, kind != 1)):
                if on_device:
                    self.region(address, size)
            ctypes.memmove(target, source, size)

        if not status:
            self.enqueue(stream, copy)
        return (status,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Status]:
        status = self._status("cudaMemsetAsync")
        if not status:
            self.enqueue(stream, lambda: self.region(address, size).fill(value))
        return (status,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:
        assert stream in self.streams
        self._not_while_capturing()
        status = self._status("cudaStreamBeginCapture")
        if not status:
            self.capturing = stream, []
        return (status,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int]:
        assert self.capturing is not None
        assert self.capturing[0] == stream
        work, self.capturing = self.capturing[1], None
        status, handle = self._status("cudaStreamEndCapture"), self._handle()
        if not status:
            self.graphs[handle] = work
        return status, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        status, handle = self._status("cudaGraphInstantiate"), self._handle()
        assert self.graphs[graph], "an empty graph"
        if not status:
            self.executables[handle] = self.graphs[graph]
        return status, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (self._status("cudaGraphDestroy"),)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:
        status = self._status("cudaGraphLaunch")
        for work in [] if status else self.executables[graph]:
            self.enqueue(stream, work)
        return (status,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Status]:
        del self.executables[graph]
        return (self._status("cudaGraphExecDestroy"),)

    def cudaGetErrorName(self, status: int) -> tuple[Status, bytes]:
        return Status(0), b"cudaErrorMemoryAllocation"

    def cudaGetErrorString(self, status: int) -> tuple[Status, bytes]:
        return Status(0), b"out of memory"


INPUTS = ("pixel_values", "grid_thw")
TENSORS = (*INPUTS, "image_embeds")


class Context:
    """An execution context: everything must be set before it runs."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.ran: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.trt.cuda.streams
        if self.trt.refuses("set_optimization_profile_async") or not 0 <= index < len(
            self.trt.profiles
        ):
            return False
        assert self.trt.cuda.capturing is None
        self.profile, self.shapes = index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.profile is not None
        needed = self.trt.memory_bytes(self.profile)
        assert size >= needed, "too little memory for activations"
        self.trt.cuda.region(memory, size)
        self.memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile selected"
        assert self.trt.cuda.capturing is None
        least, most = self.trt.profiles[self.profile][name]
        if self.trt.refuses("set_input_shape") or not least <= shape[0] <= most:
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in TENSORS
        if self.trt.refuses("set_tensor_address"):
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.shapes) == set(INPUTS), "a shape is not set"
        assert set(self.addresses) == set(TENSORS), "an address is not set"
        assert self.memory is not None, "no memory for activations"
        if self.trt.cuda.capturing is not None:
            assert self.ran == self.shapes, "captured before it ran once in this shape"
        if self.trt.refuses("execute_async_v3"):
            return False
        self.ran = dict(self.shapes)
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory

        def work() -> None:
            self.trt.cuda.region(*memory)
            arrays = {}
            for name, kind in (("pixel_values", np.float16), ("grid_thw", np.int64)):
                count = int(np.prod(shapes[name])) * np.dtype(kind).itemsize
                arrays[name] = (
                    self.trt.cuda.region(addresses[name], count).view(kind).reshape(shapes[name])
                )
            assert arrays["grid_thw"].prod(axis=1).sum() == len(arrays["pixel_values"])
            assert np.isfinite(arrays["pixel_values"]).all(), "padding that is not finite"
            out = expected_embeds(arrays["pixel_values"], self.trt.text_hidden)
            self.trt.cuda.region(addresses["image_embeds"], out.nbytes)[:] = out.reshape(-1).view(
                np.uint8
            )

        self.trt.cuda.enqueue(stream, work)
        return True


def expected_embeds(pixels: np.ndarray, text_hidden: int) -> np.ndarray:
    """What the stand-in computes: the first value of each token's first patch, repeated."""
    return np.repeat(pixels[::4, :1].astype(np.float16), text_hidden, axis=1)


class Cache:
    """TensorRT-RTX's runtime cache: takes only what it made itself, and grows by one byte each time it is written."""

    magic = b"cache of this GPU"

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.content = self.magic

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.magic):
            self.trt.refuses(self.trt.fail or "")
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content + b"."


class RuntimeConfig:
    """TensorRT-RTX's runtime configuration."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.strategy: int | None = None
        self.cache: Cache | None = None
        self.cuda_graph_strategy = 0
        self.dynamic_shapes_kernel_specialization_strategy = 0

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache | None:
        return None if self.trt.refuses("create_runtime_cache") else Cache(self.trt)

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return not self.trt.refuses("set_runtime_cache")


class Engine:
    """A deserialised engine."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.num_optimization_profiles = len(trt.profiles)

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.trt.memory_bytes(index)

    def create_runtime_config(self) -> RuntimeConfig | None:
        return None if self.trt.refuses("create_runtime_config") else RuntimeConfig(self.trt)

    def create_execution_context(self, how: int | RuntimeConfig) -> Context | None:
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        assert strategy == TensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        if isinstance(how, RuntimeConfig):
            self.trt.configs.append(how)
        return None if self.trt.refuses("create_execution_context") else Context(self.trt)


Limits = dict[str, tuple[int, int]]


class TensorRT:
    """The module, as far as it is used. `fail` names a call that shall fail, after logging `reason`."""

    __version__ = "1.7.1.116"

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = 2

    class DynamicShapesKernelSpecializationStrategy:
        LAZY, EAGER, NONE = 0, 1, 2

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = 1

    class ILogger:
        class Severity:
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: Runtime, text_hidden: int, profiles: list[Limits]) -> None:
        self.cuda = cuda
        self.text_hidden = text_hidden
        self.profiles = profiles
        self.fail: str | None = None
        self.deserialised: list[bytes] = []
        self.configs: list[RuntimeConfig] = []
        self._logger: Any = None

    def memory_bytes(self, profile: int) -> int:
        """Memory for activations."""
        return 3 * self.profiles[profile]["pixel_values"][1]

    def refuses(self, call: str) -> bool:
        if call != self.fail:
            return False
        self._logger.log(self.ILogger.Severity.WARNING, "not a reason")
        self._logger.log(self.ILogger.Severity.ERROR, f"reason of {call}")
        return True

    def Runtime(self, logger: Any) -> TensorRT | None:
        self._logger = logger
        return None if self.refuses("Runtime") else self

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.deserialised.append(plan)
        return None if self.refuses("deserialize_cuda_engine") else Engine(self)
