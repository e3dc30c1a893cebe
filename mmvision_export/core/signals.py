"""Signals that wait for the end of a block."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["signals_wait"]


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait until the block is done, and then do what they do.

    Their exceptions appear between any two lines of Python. Where these lines are called back by a
    library in C++, as in torch's tracer, the library may answer with `terminate`, and the process dies by
    SIGABRT with a trace of C++ frames (seen with torch 2.13, in `TorchDispatchModeTLS::set_mode`).

    In another thread than the main one, which no signal reaches, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)

    before: dict[int, Any] = {}
    try:
        for waiting in (signal.SIGINT, signal.SIGTERM):
            before[waiting] = signal.getsignal(waiting)
            signal.signal(waiting, remember)
        yield
    finally:
        # SIGINT last: what it interrupts may go on, as a notebook does, and shall hear the next one.
        for number, handler in reversed(before.items()):
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])
