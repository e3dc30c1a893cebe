"""What long work tells whoever waits for it.

The library reports to a `Progress`; the command line draws it.
"""

from __future__ import annotations

__all__ = ["Progress"]


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
