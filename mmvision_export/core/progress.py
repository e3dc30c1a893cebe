"""What long work tells whoever waits for it.

The library reports to a `Progress`; the command line draws it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Pace", "Progress", "counted_lines", "duration"]

_FIRST_LINE_SECONDS = 15.0
_LONGEST_SILENCE_SECONDS = 120.0


class Progress:
    """Receives the steps of a long task. This base class ignores them."""

    def step(self, description: str, total: float | None = None) -> None:
        """The next step begins and the one before it is done.

        `total` is how far `advance` will count, if known.
        """

    def advance(self, amount: float = 1.0) -> None:
        """The current step got further by `amount`."""

    def note(self, message: str) -> None:
        """Something worth reading that is not an error."""


class Pace:
    """How far a step is, how long it has taken, and an estimate of what is left.

    Args:
        description: Of the step.
        total: How far it counts; None or 0 if that is not known.
        clock: Gives seconds.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self.total = total or None
        self.done = 0.0
        self._clock = clock
        self._start = clock()
        self._due = _FIRST_LINE_SECONDS

    @property
    def elapsed_seconds(self) -> float:
        """Since the step began."""
        return self._clock() - self._start

    @property
    def remaining_seconds(self) -> float | None:
        """An estimate: what is left takes as long for its part as what is done; None at the start."""
        if self.total is None or not 0 < self.done < self.total:
            return None
        return self.elapsed_seconds * (self.total - self.done) / self.done

    def describe(self) -> str:
        """`running x: 12 of 40, 30 s, about 70 s left`, as far as it is known."""
        parts = [duration(self.elapsed_seconds)]
        if self.total is not None:
            parts.insert(0, f"{self.done:.0f} of {self.total:.0f}")
        if (remaining := self.remaining_seconds) is not None:
            parts.append(f"about {duration(remaining)} left")
        return f"{self.description}: {', '.join(parts)}"

    def is_due(self) -> bool:
        """Whether another line should be written: after 15 seconds, then ever more rarely, up to 2 minutes."""
        elapsed = self.elapsed_seconds
        if elapsed < self._due:
            return False
        self._due = elapsed + min(max(elapsed, _FIRST_LINE_SECONDS), _LONGEST_SILENCE_SECONDS)
        return True


def duration(seconds: float) -> str:
    """A length of time for people: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def counted_lines(
    current: Callable[[], Pace | None], write: Callable[[str], object]
) -> Iterator[None]:
    """Write a line on how far a step is, at growing intervals, while the block runs.

    For a log, where a bar cannot move. Steps that cannot count say how long they have taken.

    Args:
        current: The step in work, or None.
        write: Takes a line. It is called from another thread.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            pace = current()
            if pace is not None and pace.is_due():
                write(pace.describe())

    thread = threading.Thread(target=watch, name="mmvision-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
