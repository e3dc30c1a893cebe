"""The CUDA driver's library, `libcuda.so.1`, by ctypes: found, declared, and each call checked.

It comes with the driver, so it fits the driver: no wheel can be too new for it. The symbols are
those of `plugins/common/cuda_driver.cpp` and more, by the names the library exports: `cuda.h`
renames some functions to a version of their signature (`cuMemAlloc` is `cuMemAlloc_v2`), and these
are the versions that drivers from 11.4 on have.

References:
    https://docs.nvidia.com/cuda/cuda-driver-api/index.html
"""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from typing import Any

from mmvision_export.core.errors import BackendError

__all__ = ["LEAST_DRIVER", "SIGNATURES", "CudaDriver", "NoGpuError", "cuda_version_text"]

LEAST_DRIVER = 11040
"""As `cuDriverGetVersion` counts: 11.4 is the first with `cuGraphInstantiateWithFlags`."""

# Driver handles are pointers, device pointers are 64 bits (CUdeviceptr), and c_void_p holds both.
_handle = c_void_p
_out = POINTER(c_void_p)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (POINTER(c_char), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_out, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuMemAlloc_v2": (_out, c_size_t),
    "cuMemFree_v2": (_handle,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemHostAlloc": (_out, c_size_t, c_uint),
    "cuMemFreeHost": (_handle,),
    "cuMemcpyHtoDAsync_v2": (_handle, c_void_p, c_size_t, _handle),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _handle, c_size_t, _handle),
    "cuMemcpyDtoDAsync_v2": (_handle, _handle, c_size_t, _handle),
    "cuMemsetD8Async": (_handle, c_ubyte, c_size_t, _handle),
    "cuStreamCreate": (_out, c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuStreamWaitEvent": (_handle, _handle, c_uint),
    "cuStreamBeginCapture_v2": (_handle, c_int),
    "cuStreamEndCapture": (_handle, _out),
    "cuEventCreate": (_out, c_uint),
    "cuEventDestroy_v2": (_handle,),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuEventElapsedTime": (POINTER(c_float), _handle, _handle),
    "cuGraphInstantiateWithFlags": (_out, _handle, ctypes.c_ulonglong),
    "cuGraphDestroy": (_handle,),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphExecDestroy": (_handle,),
    "cuModuleLoadData": (_out, c_void_p),
    "cuModuleUnload": (_handle,),
    "cuModuleGetFunction": (_out, _handle, c_char_p),
    "cuFuncSetAttribute": (_handle, c_int, c_int),
    "cuLaunchKernel": (_handle, *(c_uint,) * 7, _handle, POINTER(c_void_p), POINTER(c_void_p)),
}
"""Symbol -> types of its arguments; each gives a CUresult."""

# The loader's own search, then where WSL and JetPack 5 and 6 put it.
_LIBRARIES = (
    "libcuda.so.1",
    "/usr/lib/wsl/lib/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
)

_STUB_LIBRARY = 34
_NO_DEVICE = 100
_SYSTEM_DRIVER_MISMATCH = 803

_HINTS = {
    _STUB_LIBRARY: "the libcuda.so.1 that was found is the CUDA toolkit's stub: take its folder "
    "'stubs' out of LD_LIBRARY_PATH",
    _SYSTEM_DRIVER_MISMATCH: "the driver's library and its kernel module are of different versions: "
    "restart the machine, or the container with the host's driver",
}


class NoGpuError(BackendError):
    """There is no CUDA driver, or it sees no GPU: the machine has none, or hides it."""


class CudaDriver:
    """The driver's functions.

    Args:
        library: What has them; what `found` finds, or a test's.

    Attributes:
        calls: Function -> how often it succeeded.

    Raises:
        NoGpuError: There is no GPU.
        BackendError: There is a driver, but it is too old, a stub, or it does not start.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        version = c_int()
        # The one call that is allowed before cuInit. A stub answers it with its error.
        self.check("cuDriverGetVersion", self._function("cuDriverGetVersion")(version))
        self.version = version.value
        if 0 < self.version < LEAST_DRIVER:
            raise _too_old(self.version)
        self.check("cuInit", self._function("cuInit")(0))
        for symbol in SIGNATURES:
            self._function(symbol)

    @classmethod
    @functools.cache
    def found(cls) -> CudaDriver:
        """This machine's; the same one each time.

        Raises:
            NoGpuError: There is no driver, or no GPU.
            BackendError: The driver is too old, a stub, or does not start.
        """
        return cls(_loaded(_LIBRARIES))

    def call(self, symbol: str, *arguments: Any) -> None:
        """Call a function of `SIGNATURES`.

        Raises:
            NoGpuError: It says that there is no device.
            BackendError: It gives any other error.
        """
        self.check(symbol, self._function(symbol)(*arguments))
        self.calls[symbol] += 1

    def new(self, symbol: str, *arguments: Any) -> int:
        """Call a function that writes a handle or an address to its first argument, and give that.

        Raises:
            BackendError: It gives an error.
        """
        result = c_void_p()
        self.call(symbol, result, *arguments)
        return result.value or 0

    def has(self, symbol: str) -> bool:
        """Whether the library exports a symbol, of `SIGNATURES` or not."""
        return hasattr(self._library, symbol)

    def check(self, symbol: str, result: int) -> None:
        """Raise the driver's name and text for a CUresult other than success."""
        if result == 0:
            return
        name, text = self._text("cuGetErrorName", result), self._text("cuGetErrorString", result)
        function = symbol.partition("_v")[0]  # as documentation calls it
        message = f"{function} failed with {name or f'error {result}'}" + (
            f": {text}" if text else ""
        )
        if result == _NO_DEVICE:
            raise NoGpuError(
                f"the CUDA driver sees no GPU: {message}",
                hint="check that this machine has a GPU and gives it to this container (--gpus all); "
                "CUDA_VISIBLE_DEVICES hides GPUs that it does not name",
            )
        raise BackendError(message, hint=_HINTS.get(result, "see: mmvision doctor"))

    def _text(self, symbol: str, result: int) -> str:
        text = c_char_p()
        if self._function(symbol)(result, text) or text.value is None:
            return ""
        return text.value.decode(errors="replace")

    def _function(self, symbol: str) -> Any:
        if (known := self._functions.get(symbol)) is not None:
            return known
        try:
            function = getattr(self._library, symbol)
        except AttributeError:
            raise BackendError(
                f"libcuda.so.1 has no {symbol}: the driver is older than CUDA "
                f"{cuda_version_text(LEAST_DRIVER)}",
                hint="install a newer driver",
            ) from None
        function.argtypes, function.restype = SIGNATURES[symbol], c_int
        self._functions[symbol] = function
        return function


def cuda_version_text(version: int) -> str:
    """`12060` -> `12.6`, as `cuDriverGetVersion` counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _too_old(version: int) -> BackendError:
    return BackendError(
        f"the CUDA driver is too old: it has CUDA {cuda_version_text(version)}, and CUDA "
        f"{cuda_version_text(LEAST_DRIVER)} or later is needed",
        hint="install a newer driver; on a Jetson it comes with JetPack",
    )


def _loaded(libraries: Sequence[str]) -> ctypes.CDLL:
    reasons = []
    for name in libraries:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise NoGpuError(
        f"there is no CUDA driver: {reasons[0]}",
        hint="install NVIDIA's driver; in a container, start it with the host's (--gpus all, or "
        "--runtime nvidia on a Jetson)",
    )
