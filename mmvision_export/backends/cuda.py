"""The few CUDA runtime calls an engine needs, each checked where it is made.

Through NVIDIA's `cuda-bindings`, so that running an engine needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mmvision_export.errors import BackendError

__all__ = ["Cuda", "DeviceBuffer"]


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

    def compute_capability(self) -> str:
        """The device's, as `8.9`."""
        attribute = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.device)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.device)
        return f"{int(major)}.{int(minor)}"

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
        """Copy a C-contiguous array to device memory, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Copy device memory to a C-contiguous array, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            status, *results = getattr(self._runtime, function)(*arguments)
        except RuntimeError as error:  # raised instead of a status when libcudart or the driver cannot be loaded
            raise BackendError(f"{function} failed: {error}", hint="see: mmvision doctor") from error
        if int(status) != 0:
            _, name = self._runtime.cudaGetErrorName(status)
            _, text = self._runtime.cudaGetErrorString(status)
            parts = [part.decode() if isinstance(part, bytes) else str(part) for part in (name, text)]
            raise BackendError(f"{function} failed with {parts[0]}: {parts[1]}", hint="see: mmvision doctor")
        return results[0] if results else None


class DeviceBuffer:
    """Device memory that grows to the largest size asked of it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size_bytes = 0
        self.address = 0

    def reserve(self, size_bytes: int) -> int:
        """Address of at least that much memory; what it held before is lost if it had to grow."""
        if size_bytes > self._size_bytes:
            self.free()
            self.address = self._cuda.allocate(size_bytes)
            self._size_bytes = size_bytes
        return self.address

    def free(self) -> None:
        """Give the memory back."""
        if self.address:
            address, self.address, self._size_bytes = self.address, 0, 0
            self._cuda.free(address)
