"""Launch a compiled kernel on a case by the driver alone: plain, under a captured graph, and timed.

The arguments are those of `plugins/<op>/kernel.py` and of the plugins that launch them, in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.verify_gpu.cases import Case
from mmvision_export.verify_gpu.pack_file import KernelImage

__all__ = ["Launcher", "opened", "wrong_inputs"]

_WARP = 32
_SHARED_WITHOUT_ASKING = 48 * 1024
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NEVER_WRITTEN = 0xFF  # NaN in both types
_REPEATS = 20
_LAUNCHES = 10  # between two events, which are too coarse for one


class Launcher:
    """A case and its kernel on the device, ready to be launched. See `opened`."""

    def __init__(self, cuda: Cuda, kernel: KernelImage, case: Case, function: int) -> None:
        self._cuda = cuda
        self._kernel = kernel
        self._function = function
        self._cleanup = contextlib.ExitStack()
        self.stream = self._held(cuda.new_stream(), cuda.free_stream)
        self._inputs = [self._uploaded(array) for array in case.inputs]
        self._shapes = [array.shape for array in case.expected]
        self._outputs = [
            self._held(cuda.allocate(2 * math.prod(shape)), cuda.free) for shape in self._shapes
        ]
        cuda.synchronize(self.stream)
        self._arguments = [*map(c_void_p, [*self._inputs, *self._outputs]), *self._scalars(case)]
        self._arguments += [c_void_p(), c_void_p()]  # scratch that Triton gives every kernel
        self._grid = self._grid_of(case)

    def _held(self, handle: int, free: Any) -> int:
        self._cleanup.callback(free, handle)
        return handle

    def _uploaded(self, array: npt.NDArray[Any]) -> int:
        address = self._held(self._cuda.allocate(array.nbytes), self._cuda.free)
        self._cuda.to_device(address, np.ascontiguousarray(array), self.stream)
        self._cuda.synchronize(self.stream)
        return address

    def _scalars(self, case: Case) -> list[Any]:
        num_patches, num_heads, head_dim = case.inputs[0].shape
        if case.op == "varlen_attention":
            num_segments = len(case.inputs[3]) - 1
            scale_log2 = case.scalars["scale"] * math.log2(math.e)
            row_stride = num_heads * head_dim
            return [*map(c_int32, (num_patches, num_segments, row_stride)), c_float(scale_log2)]
        half = int(case.scalars["half"])
        return [c_int32(num_patches), c_int32(num_heads), c_int32(head_dim), c_int32(half)]

    def _grid_of(self, case: Case) -> tuple[int, int, int]:
        num_patches, num_heads, _ = case.inputs[0].shape
        rows = self._kernel.rows
        if case.op == "varlen_attention":
            return num_patches // rows + len(case.inputs[3]) - 1, num_heads, 1
        return -(-num_patches // rows), num_heads, 2

    def enqueue(self) -> None:
        """Put one launch into the stream."""
        pointers = (c_void_p * len(self._arguments))(*map(ctypes.addressof, self._arguments))
        block = self._kernel.num_warps * _WARP
        self._cuda.driver.call(
            "cuLaunchKernel",
            self._function,
            *self._grid,
            block,
            1,
            1,
            self._kernel.shared_bytes,
            self.stream,
            pointers,
            None,
        )

    def results(self, *, graph: int | None) -> list[npt.NDArray[np.uint16]]:
        """Outputs of one launch, or of a graph's, as uint16; memory holds NaN before."""
        for address, shape in zip(self._outputs, self._shapes, strict=True):
            size = 2 * math.prod(shape)
            self._cuda.driver.call("cuMemsetD8Async", address, _NEVER_WRITTEN, size, self.stream)
        self._launched(graph)
        arrays = [np.empty(shape, np.uint16) for shape in self._shapes]
        for array, address in zip(arrays, self._outputs, strict=True):
            self._cuda.to_host(array, address, self.stream)
        self._cuda.synchronize(self.stream)
        return arrays

    def captured(self) -> int:
        """A graph of one launch."""
        graph = self._cuda.captured(self.enqueue, self.stream)
        return self._held(graph, self._cuda.free_graph)

    def _launched(self, graph: int | None) -> None:
        if graph is None:
            self.enqueue()
        else:
            self._cuda.launch(graph, self.stream)

    def times_us(self, *, graph: int | None) -> dict[str, float]:
        """Microseconds of a launch between CUDA events, each over several: median, least and most."""
        with contextlib.ExitStack() as events:
            first, last = (self._cuda.new_event(timing=True) for _ in range(2))
            for event in (first, last):
                events.callback(self._cuda.free_event, event)
            times = []
            for _ in range(_REPEATS):
                self._cuda.record(first, self.stream)
                for _ in range(_LAUNCHES):
                    self._launched(graph)
                self._cuda.record(last, self.stream)
                self._cuda.wait_here(last)
                times.append(1e3 * self._cuda.elapsed_ms(first, last) / _LAUNCHES)
        return {"median": statistics.median(times), "least": min(times), "most": max(times)}

    def close(self) -> None:
        """Free everything."""
        self._cleanup.close()


@contextlib.contextmanager
def opened(cuda: Cuda, kernel: KernelImage, image: bytes, case: Case) -> Iterator[Launcher]:
    """A launcher of a kernel on a case, freed at the end.

    Raises:
        BackendError: The driver refused a step.
    """
    with contextlib.ExitStack() as held:
        module = cuda.driver.new("cuModuleLoadData", image + b"\0")  # PTX is a string
        held.callback(cuda.driver.call, "cuModuleUnload", module)
        function = cuda.driver.new("cuModuleGetFunction", module, kernel.function.encode())
        if kernel.shared_bytes > _SHARED_WITHOUT_ASKING:
            cuda.driver.call(
                "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, kernel.shared_bytes
            )
        launcher = Launcher(cuda, kernel, case, function)
        held.callback(launcher.close)
        yield launcher


def wrong_inputs(case: Case) -> list[npt.NDArray[Any]] | None:
    """Inputs whose result a comparison must refuse; None where a wrong launch gives the same.

    Of attention all segments are one, of the rotation cos and sin change places.
    """
    if case.op == "qk_rotary_embedding":
        q, k, cos, sin = case.inputs
        return [q, k, sin, cos]
    bounds = case.inputs[3]
    if np.count_nonzero(np.diff(bounds)) < 2:
        return None
    one = np.full_like(bounds, bounds[-1])
    one[0] = 0
    return [*case.inputs[:3], one]
