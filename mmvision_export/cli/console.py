"""What the `mmvision` command shows.

Results on standard output, progress and notes on standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from mmvision_export.core.errors import printable
from mmvision_export.core.progress import Progress

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

    Where standard error is no terminal, each step is one line of text when it begins.
    """

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._task: TaskID | None = None

    def step(self, description: str, total: float | None = None) -> None:
        """See `Progress.step`."""
        self.finish()
        if not messages.is_terminal:
            messages.print(f"{description} ...", markup=False)
            return
        self._task = self._display.add_task(description, total=total)

    def advance(self, amount: float = 1.0) -> None:
        """See `Progress.advance`."""
        if self._task is not None:
            self._display.advance(self._task, amount)

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        messages.print(f"note: {message}", markup=False)

    def finish(self) -> None:
        """The current step is done."""
        if self._task is not None:
            # A step whose length was not known has no total to fill.
            task = self._display.tasks[self._display.task_ids.index(self._task)]
            total = task.total if task.total is not None else 1
            self._display.update(self._task, total=total, completed=total)
            self._task = None


@contextlib.contextmanager
def progress_display() -> Iterator[ConsoleProgress]:
    """Show progress while the block runs."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
    )
    with RichProgress(
        *columns, TimeElapsedColumn(), console=messages, disable=not messages.is_terminal
    ) as display:
        progress = ConsoleProgress(display)
        yield progress
        progress.finish()
