"""The rows of a grid on their way to the device, in host memory that stays until they are there.

A copy is asynchronous: a GPU that reads the host's memory by itself (a Jetson, or any with pageable
access) reads it when the stream has come that far, and not when the copy is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.runtime.backends.cuda import Cuda

__all__ = ["PinnedRows"]

_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class _Slot:
    rows: npt.NDArray[np.int64]  # [max_rows, 3], pinned
    sent: int  # an event: the rows are on the device


class PinnedRows:
    """Two slots of pinned memory, used in turn, each guarded by an event.

    Args:
        cuda: The device, in use by the calling thread.
        max_rows: Most rows of a launch.
        cleanup: Frees what is made here.
    """

    def __init__(self, cuda: Cuda, max_rows: int, cleanup: contextlib.ExitStack) -> None:
        self._cuda = cuda
        self._next = 0
        self._slots = []
        for _ in range(_SLOTS):
            address = cuda.allocate_pinned(max_rows * 3 * np.dtype(np.int64).itemsize)
            cleanup.callback(cuda.free_pinned, address)
            event = cuda.new_event()
            cleanup.callback(cuda.free_event, event)
            memory: Any = (ctypes.c_int64 * (max_rows * 3)).from_address(address)
            self._slots.append(_Slot(np.ctypeslib.as_array(memory).reshape(max_rows, 3), event))

    def send(self, address: int, rows: npt.NDArray[np.int64], stream: int) -> None:
        """Copy rows to the device, in stream order; they may change once this returns.

        Waits for the copy before the last one, which two launches later is long over.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % _SLOTS
        self._cuda.wait_here(slot.sent)
        staged = slot.rows[: len(rows)]
        staged[:] = rows
        self._cuda.to_device(address, staged, stream)
        self._cuda.record(slot.sent, stream)
