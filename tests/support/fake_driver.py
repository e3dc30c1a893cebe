"""The stand-in for libcuda.so.1, loaded: set up, asked what it saw, and held to what it found."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.kernels.stand_in import STAND_IN, build_stand_in
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.cuda_driver import CudaDriver
from tests.support.tools import once, tool

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, STUB_LIBRARY, NO_DEVICE = 0, 1, 2, 34, 100

_WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
OnLaunch = Callable[[str, tuple[int, int, int], tuple[int, int, int], list[int]], None]


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class FakeDriver:
    """One stand-in, with state of its own and one device.

    Attributes:
        failures: Exceptions of work that ran in a stream.
    """

    def __init__(self, library: Path, *, sm: int = 89, devices: int = 1) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.fakeReport.restype = ctypes.c_size_t
        self.library.fakeIsDeviceMemory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.fakeLaunchWork.argtypes = [
            ctypes.c_void_p,
            _WORK,
            ctypes.c_void_p,
            ctypes.POINTER(_Range),
            ctypes.c_size_t,
        ]
        self.failures: list[BaseException] = []
        self._kept: list[Any] = []  # a graph may run a callback again
        for _ in range(devices):
            self.library.fakeAddDevice(sm, 0)

    def cuda(self, device: int = 0) -> Cuda:
        """A device, as the product opens it."""
        return Cuda(device, CudaDriver(self.library))

    def set_device(self, *, sm: int, is_integrated: bool = False, device: int = 0) -> None:
        """Make a device another GPU."""
        self.library.fakeSetDevice(device, sm, int(is_integrated))

    def fail(self, function: str, result: int = OUT_OF_MEMORY) -> None:
        """Let every call of a function give a result from now on, or none for SUCCESS."""
        self.library.fakeFail(function.encode(), result)

    def refuse_captures(self, refuses: bool = True) -> None:
        """Let no work into a capture, as that of a stream which waits for the host."""
        self.library.fakeRefuseCaptures(int(refuses))

    def is_capturing(self, stream: int) -> bool:
        return bool(self.library.fakeIsCapturing(ctypes.c_void_p(stream)))

    def is_current(self) -> bool:
        """Whether the calling thread has a context."""
        context = ctypes.c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value is not None

    def report(self) -> dict[str, Any]:
        text = ctypes.create_string_buffer(self.library.fakeReport(None, 0) + 1)
        self.library.fakeReport(text, len(text))
        report: dict[str, Any] = json.loads(text.value)
        return report

    def count(self, function: str) -> int:
        """How often a function was called."""
        return int(self.report()["calls"].count(function))

    def held(self, kind: str) -> int:
        """How many of a kind were made and not freed."""
        return int(self.report()["held"][kind])

    def holds_nothing(self) -> bool:
        return not any(self.report()["held"].values())

    def broken_rules(self) -> list[str]:
        """The rules that were broken so far; they are not reported again."""
        report = self.report()["broken"]
        fresh = report[self._seen :]
        self._seen = len(report)
        return list(fresh)

    _seen = 0

    def region(self, address: int, size: int) -> np.ndarray:
        """Device memory from an address on, as bytes."""
        assert self.library.fakeIsDeviceMemory(address, size), (
            f"{size} bytes at {address} are not device memory"
        )
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))

    def launch_work(
        self, work: Callable[[], None], ranges: Sequence[tuple[int, int]], stream: int
    ) -> int:
        """Put work on memory (address and size) into a stream, as an engine does; gives a CUresult."""

        def run(_: int | None) -> int:
            try:
                work()
            except BaseException as error:  # through C no exception passes
                self.failures.append(error)
                return 1
            return 0

        callback = _WORK(run)
        self._kept.append(callback)
        array = (_Range * len(ranges))(*(_Range(*each) for each in ranges))
        return int(self.library.fakeLaunchWork(stream, callback, None, array, len(ranges)))

    def on_launch(self, kernel: OnLaunch) -> None:
        """What launches of kernels do: function, grid, block, and the addresses of the arguments."""

        def run(name: bytes, grid: Any, block: Any, arguments: Any, count: int) -> int:
            try:
                kernel(
                    name.decode(),
                    (grid[0], grid[1], grid[2]),
                    (block[0], block[1], block[2]),
                    [arguments[i] for i in range(count)],
                )
            except BaseException as error:
                self.failures.append(error)
                return 1
            return 0

        callback = _ON_LAUNCH(run)
        self._kept.append(callback)
        self.library.fakeOnLaunch(callback)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's file, compiled once for all worker processes."""
    tool("g++", "g++")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    return once(shared / "stand-in-driver", build_stand_in) / STAND_IN


@pytest.fixture
def fake_driver(stand_in: Path, tmp_path: Path) -> Iterator[FakeDriver]:
    """A stand-in of this test's own; what it found broken at the end is a failure."""
    copy = tmp_path / STAND_IN  # the loader takes another file for another library
    shutil.copyfile(stand_in, copy)
    driver = FakeDriver(copy)
    yield driver
    assert driver.broken_rules() == []
    assert driver.failures == []
