"""What every command does around its work: signals, errors in words, and exit codes.

It needs neither typer nor rich, so that `python -m mmvision_export.run` works without them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mmvision_export.core.errors import message_and_hint, print_error
from mmvision_export.core.progress import Pace, Progress

__all__ = ["INTERRUPTED", "ProgressLine", "elapsed_line", "exit_code_of", "print_failure"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and SIGINT's number."""

_NOBODY_READS = 141  # 128 and SIGPIPE's number


def print_failure(error: Exception) -> int:
    """Print an error and what to do about it, and give its exit code."""
    print_error(*message_and_hint(error))
    return 1


def exit_code_of(
    work: Callable[[], int],
    *,
    verbose: bool,
    on_error: Callable[[Exception], int] = print_failure,
) -> int:
    """Do the work of a command, and say in words why it ended if it did not end well.

    SIGTERM interrupts as Ctrl-C does, so that a killed command cleans up what it was writing. What
    is no `Exception`, such as the SystemExit of wrong usage, passes through.

    Args:
        work: Gives its exit code, or raises.
        verbose: Let errors pass, with their traceback.
        on_error: Prints an error and gives its exit code.

    Returns:
        What `work` or `on_error` gave; 130 if it was interrupted by Ctrl-C and 143 by SIGTERM,
        whatever they gave; 141 if whoever read standard output is gone.
    """
    _open_closed_streams()
    received: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        try:
            code = work()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            # As `| head` does it. What is still to be flushed would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = _NOBODY_READS
        except BaseException as error:
            # An interrupt may arrive as the error of a library that was in the middle of something.
            if not received:
                if verbose or not isinstance(error, Exception):
                    raise
                return on_error(error)
    if received or code == INTERRUPTED:
        print_error("interrupted; unfinished work is not kept")
        return 128 + received[0] if received else INTERRUPTED
    return code


def _open_closed_streams() -> None:
    """Give standard streams that are closed (`>&-`) to the null device.

    Otherwise the next file that is opened takes their number, and what a library prints goes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class ProgressLine(Progress):
    """One line on standard error that counts; where that is no terminal, a line now and then."""

    def __init__(self) -> None:
        self._pace = Pace("")

    def step(self, description: str, total: float | None = None) -> None:
        """See `Progress.step`."""
        self._pace = Pace(description, total)
        self._draw()

    def advance(self, amount: float = 1.0) -> None:
        """See `Progress.advance`."""
        self._pace.done += amount
        self._draw()

    def _draw(self) -> None:
        pace = self._pace
        if not sys.stderr.isatty():
            if pace.is_due():
                print(pace.describe(), file=sys.stderr, flush=True)
            return
        # Wiped to the end of the line: the estimate before may have been longer.
        end = "\n" if pace.total is None or pace.done >= pace.total else ""
        print(f"\r{pace.describe()}\x1b[K", end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def elapsed_line(description: str, *, quiet: bool = False) -> Iterator[None]:
    """Count the seconds on standard error while the block does one thing that tells nothing.

    On a terminal from the second second on, in one line that is wiped at the end; elsewhere nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def count() -> None:
        start = time.monotonic()
        while not done.wait(1.0):
            seconds = time.monotonic() - start
            print(f"\r{description} ... {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
