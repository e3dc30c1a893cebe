"""The fewest units to keep, in a bounded number of whole graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["MOST_EVALUATIONS", "fewest_kept"]

MOST_EVALUATIONS = 10
"""Of whole graphs, the one with every unit quantised among them."""

_GUIDED = 4  # guesses by the estimate; after them the interval is halved, for it may mislead
# A gate is about the worst token and the estimate about a mean: before anything is known of their
# ratio.
_WORST_TO_MEAN = 4.0
_LINEAR = 0.05  # of a cosine: a loss beyond this says nothing of small ones


def fewest_kept(
    loss_of: Callable[[int], float],
    estimates: Sequence[float],
    *,
    loss_of_none: float,
    allowed: float,
    most: int = MOST_EVALUATIONS - 1,
) -> int | None:
    """How many of the first units to keep, so that the graph loses no more than is allowed.

    Args:
        loss_of: Evaluates the graph that keeps so many: the most that a token's cosine is below 1;
            infinite where a value is not finite.
        estimates: What each unit adds to a mean loss, the largest first.
        loss_of_none: The loss with none kept, which is more than is allowed.
        allowed: The most that may be lost.
        most: Evaluations.

    Returns:
        The smallest number that was evaluated and passed; None if none did. It is the smallest
        there is, in the order given and as far as keeping more never loses more, unless the
        evaluations ran out.
    """
    left = np.append(np.cumsum(np.asarray(estimates, np.float64)[::-1])[::-1], 0.0)
    failed, passed = 0, len(estimates) + 1  # keeping all may fail too
    ratio = _ratio(loss_of_none, left[0]) or _WORST_TO_MEAN
    for evaluation in range(most):
        if passed - failed == 1:
            break
        if evaluation == most - 1 and passed > len(estimates):
            kept = max(failed + 1, len(estimates) - 1)  # the last chance that any passes
        elif evaluation < _GUIDED:
            kept = int(np.argmax(left * ratio <= allowed))
        else:
            kept = (failed + passed) // 2
        kept = min(max(kept, failed + 1), passed - 1)
        loss = loss_of(kept)
        if loss <= allowed:
            passed = kept
        else:
            failed = kept
        ratio = _ratio(loss, left[kept]) or ratio
    return passed if passed <= len(estimates) else None


def _ratio(loss: float, estimate: float) -> float | None:
    return loss / estimate if loss < _LINEAR and estimate > 0 else None
