"""What a process opened is not used by the processes that it forks.

A fork has the memory of a runtime and none of its threads. Its results may be right. To free it waits
for those threads for ever: OpenVINO's session does, in `close()` and when Python ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from typing import Any

from mmvision_export.core.errors import BackendError

__all__ = ["OwnProcess"]

_opened: weakref.WeakSet[Any] = weakref.WeakSet()


class OwnProcess:
    """The process that opened a backend."""

    def __init__(self, backend: Any) -> None:
        self._pid = os.getpid()
        _opened.add(backend)

    @property
    def is_this(self) -> bool:
        """Whether this is that process, and no fork of it."""
        return os.getpid() == self._pid

    def refuse_fork(self) -> None:
        """Refuse to run in a fork.

        Raises:
            BackendError: This is one.
        """
        if not self.is_this:
            raise BackendError(
                f"process {self._pid} opened the encoder, and this is process {os.getpid()}, a fork "
                "of it, without the runtime's threads",
                hint="open an encoder in each process, or start processes by spawn",
            )


def _never_free() -> None:
    """In a fork: keep what the process before it opened until this one ends, and beyond Python's end."""
    with contextlib.suppress(AttributeError):  # another Python than CPython
        for backend in list(_opened):
            for kept in (backend, *vars(backend).values()):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_free)
