"""A progress that keeps its notes."""

from __future__ import annotations

from mmvision_export.core.progress import Progress


class Notes(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.advanced = 0.0

    def step(self, description: str, total: float | None = None) -> None:
        self.steps.append(description)

    def advance(self, amount: float = 1.0) -> None:
        self.advanced += amount

    def note(self, message: str) -> None:
        self.notes.append(message)
