"""A stand-in for TensorRT and the CUDA runtime that enforces their rules at the API's boundary.

No kernel runs: an "engine" copies nothing and computes a number per token from what is in device memory, enough to see
that the right bytes went to the right address in the right order. What TensorRT leaves undefined (an address not set, a
shape not set, memory too small, a stream that does not exist) fails here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Status(int):
    """A CUDA status."""


class Runtime:
    """`cuda.bindings.runtime`, as far as it is used. `fail` names a call that shall return an error."""

    class cudaDeviceAttr:
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1) -> None:
        self.capability = capability
        self.devices = devices
        self.fail: str | None = None
        self.memory: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.log: list[str] = []
        self._next = 1 << 20

    def _status(self, call: str) -> Status:
        self.log.append(call)
        return Status(2 if call == self.fail else 0)

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return self._status("cudaGetDeviceCount"), self.devices

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (self._status("cudaSetDevice"),)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        return self._status("cudaDeviceGetAttribute"), self.capability[attribute - 75]

    def cudaStreamCreate(self) -> tuple[Status, int]:
        status = self._status("cudaStreamCreate")
        if not status:
            self._next += 1
            self.streams.add(self._next)
        return status, self._next

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.remove(stream)
        return (self._status("cudaStreamDestroy"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        assert stream in self.streams
        return (self._status("cudaStreamSynchronize"),)

    def cudaMalloc(self, size: int) -> tuple[Status, int]:
        assert size > 0
        status = self._status("cudaMalloc")
        address = 0
        if not status:
            memory = np.full(size, 0xFF, dtype=np.uint8)  # NaN in every float type
            address = memory.ctypes.data
            self.memory[address] = memory
        return status, address

    def cudaFree(self, address: int) -> tuple[Status]:
        del self.memory[address]  # KeyError: freed twice, or never allocated
        return (self._status("cudaFree"),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        assert stream in self.streams
        status = self._status("cudaMemcpyAsync")
        device = target if kind == 1 else source
        assert device in self.memory, "not device memory"
        assert size <= len(self.memory[device]), "beyond the end of device memory"
        if not status:
            ctypes.memmove(target, source, size)
        return (status,)

    def cudaGetErrorName(self, status: int) -> tuple[Status, bytes]:
        return Status(0), b"cudaErrorMemoryAllocation"

    def cudaGetErrorString(self, status: int) -> tuple[Status, bytes]:
        return Status(0), b"out of memory"


class Context:
    """An execution context: everything must be set before it runs."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.trt.cuda.streams
        if self.trt.refuses("set_optimization_profile_async") or index != 0:
            return False
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile selected"
        least, most = self.trt.limits[name]
        if self.trt.refuses("set_input_shape") or not least <= shape[0] <= most:
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in ("pixel_values", "grid_thw", "image_embeds")
        if self.trt.refuses("set_tensor_address"):
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.trt.cuda.streams
        assert set(self.shapes) == {"pixel_values", "grid_thw"}, "a shape is not set"
        assert set(self.addresses) == {"pixel_values", "grid_thw", "image_embeds"}, "an address is not set"
        if self.trt.refuses("execute_async_v3"):
            return False
        arrays = {}
        for name, kind in (("pixel_values", np.float16), ("grid_thw", np.int64)):
            memory, count = self.trt.cuda.memory[self.addresses[name]], int(np.prod(self.shapes[name]))
            arrays[name] = memory[: count * np.dtype(kind).itemsize].view(kind).reshape(self.shapes[name])
        assert arrays["grid_thw"].prod(axis=1).sum() == len(arrays["pixel_values"])
        out = expected_embeds(arrays["pixel_values"], self.trt.text_hidden)
        memory = self.trt.cuda.memory[self.addresses["image_embeds"]]
        assert out.nbytes <= len(memory), "the output does not fit its memory"
        memory[: out.nbytes] = out.reshape(-1).view(np.uint8)
        return True


def expected_embeds(pixels: np.ndarray, text_hidden: int) -> np.ndarray:
    """What the stand-in computes: each token's four patches' first values, repeated."""
    tokens = pixels[:, 0].reshape(-1, 4).astype(np.float16)
    return np.ascontiguousarray(np.resize(tokens[:, :1], (len(tokens), text_hidden)).astype(np.float16))


class Engine:
    """A deserialised engine."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt

    def create_execution_context(self) -> Context | None:
        return None if self.trt.refuses("create_execution_context") else Context(self.trt)


class TensorRT:
    """The `tensorrt_rtx` module, as far as it is used. `fail` names a call that shall fail, after logging `reason`."""

    __version__ = "1.7.1.116"

    class ILogger:
        class Severity:
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: Runtime, text_hidden: int, limits: dict[str, tuple[int, int]]) -> None:
        self.cuda = cuda
        self.text_hidden = text_hidden
        self.limits = limits
        self.fail: str | None = None
        self.deserialised: list[bytes] = []
        self._logger: Any = None

    def refuses(self, call: str) -> bool:
        if call != self.fail:
            return False
        self._logger.log(self.ILogger.Severity.WARNING, "not a reason")
        self._logger.log(self.ILogger.Severity.ERROR, f"reason of {call}")
        return True

    def Runtime(self, logger: Any) -> TensorRT:
        self._logger = logger
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.deserialised.append(plan)
        return None if self.refuses("deserialize_cuda_engine") else Engine(self)
