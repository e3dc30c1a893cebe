"""What the `mmvision` command shows.

Results on standard output, progress and notes on standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mmvision_export.core.errors import printable
from mmvision_export.core.progress import Pace, Progress, counted_lines, duration

__all__ = ["ConsoleProgress", "console", "messages", "progress_display"]


class PrintableConsole(Console):
    """Writes out the control characters of a text, which a file's name may hold: see `printable`."""

    def print(self, *objects: Any, **options: Any) -> None:
        """See `Console.print`."""
        super().print(
            *(printable(each) if isinstance(each, str) else each for each in objects), **options
        )


console = PrintableConsole(highlight=False, soft_wrap=True)
"""Results, on standard output."""

messages = PrintableConsole(stderr=True, highlight=False, soft_wrap=True)
"""Progress, notes and errors."""


class ConsoleProgress(Progress):
    """Draws one line per step: a bar while it runs, a tick and its time when it is done.

    Where standard error is no terminal, each step is one line of text when it begins, and more lines
    on how far it is when it takes long.
    """

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._task: TaskID | None = None
        self.pace: Pace | None = None

    def step(self, description: str, total: float | None = None) -> None:
        """See `Progress.step`."""
        self.finish()
        self.pace = Pace(description, total)
        if not messages.is_terminal:
            messages.print(f"{description} ...", markup=False)
            return
        self._task = self._display.add_task(description, total=total)

    def advance(self, amount: float = 1.0) -> None:
        """See `Progress.advance`."""
        if self.pace is not None:
            self.pace.done += amount
        if self._task is not None:
            self._display.advance(self._task, amount)

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        messages.print(f"note: {message}", markup=False)

    def finish(self) -> None:
        """The current step is done."""
        self.pace = None
        if self._task is not None:
            # A step whose length was not known has no total to fill.
            task = self._display.tasks[self._display.task_ids.index(self._task)]
            total = task.total if task.total is not None else 1
            self._display.update(self._task, total=total, completed=total)
            self._task = None


class _Pace(ProgressColumn):
    """Done of total, the time, and while it runs an estimate of what is left."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn.render`."""
        elapsed = task.finished_time if task.finished else task.elapsed
        words = [duration(elapsed or 0.0)]
        if task.total is not None and not task.finished:
            words.insert(0, f"{task.completed:.0f} of {task.total:.0f}")
            if task.time_remaining is not None and task.completed:
                words.append(f"about {duration(task.time_remaining)} left")
        return Text(", ".join(words))


@contextlib.contextmanager
def progress_display() -> Iterator[ConsoleProgress]:
    """Show progress while the block runs."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _Pace(),
    )
    with RichProgress(*columns, console=messages, disable=not messages.is_terminal) as display:
        progress = ConsoleProgress(display)
        lines = (
            contextlib.nullcontext()
            if messages.is_terminal
            else counted_lines(
                lambda: progress.pace, lambda line: messages.print(line, markup=False)
            )
        )
        with lines:
            yield progress
        progress.finish()
