"""What a result must reach to pass a comparison."""

from __future__ import annotations

import dataclasses

from mmvision_export.core.metrics import Metrics

__all__ = ["Gate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What a graph must reach on every input, against PyTorch in float64.

    Attributes:
        max_relative_l2: Largest relative L2 difference, or None.
        min_cosine: Smallest cosine similarity of any token.
        times_eager: Largest relative L2 difference as a multiple of eager PyTorch's in the same
            precision, or None.
    """

    max_relative_l2: float | None
    min_cosine: float
    times_eager: float | None

    def describe(self) -> str:
        """The gate in words."""
        parts = [f"minimum cosine >= {self.min_cosine}"]
        if self.max_relative_l2 is not None:
            parts.append(f"relative L2 <= {self.max_relative_l2:.0e}")
        if self.times_eager is not None:
            parts.append(
                f"relative L2 <= {self.times_eager:g} x eager PyTorch's in the same precision"
            )
        return ", ".join(parts)

    def limit(self, eager: Metrics | None) -> float | None:
        """Largest relative L2 difference allowed beside eager PyTorch's, or None if any is."""
        limits = [] if self.max_relative_l2 is None else [self.max_relative_l2]
        # Where PyTorch itself is not finite, its error says nothing about a graph's.
        if self.times_eager is not None and eager is not None and not eager.non_finite:
            limits.append(self.times_eager * eager.relative_l2)
        return min(limits, default=None)

    def failures(self, result: Metrics, eager: Metrics | None) -> list[str]:
        """Why a result does not pass; nothing if it does."""
        if result.non_finite:
            return [f"{result.non_finite} values are not finite"]
        found = []
        # Written so that NaN fails.
        limit = self.limit(eager)
        if limit is not None and not result.relative_l2 <= limit:
            by = (
                ""
                if limit == self.max_relative_l2
                else f", {self.times_eager:g} x PyTorch's in the same precision"
            )
            found.append(f"relative L2 {result.relative_l2:.2e} > {limit:.2e}{by}")
        if not result.min_cosine >= self.min_cosine:
            why = ""
            if eager is not None and not eager.min_cosine >= self.min_cosine:
                why = (
                    f"; PyTorch itself has {eager.min_cosine:.6f} in this precision, "
                    "which does not suffice here"
                )
            found.append(f"minimum cosine {result.min_cosine:.6f} < {self.min_cosine}{why}")
        return found
