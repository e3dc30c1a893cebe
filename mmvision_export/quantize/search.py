"""The fewest units to keep, in a bounded number of whole graphs.

What a unit adds to the loss depends on the token, and a gate is about the worst one. So each ranking is
about some tokens: the first about those that lose the most with every unit quantised, each further
one about those that lose the most in a graph that failed. A ranking makes a demand: the units that are
quantised may together lose these tokens no more than is allowed. The units to keep are chosen so
that all demands hold. A graph that fails adds a demand that the graph breaks; a graph that passes shows
by how much the demands ask too much.

This is a cutting-plane method (Kelley 1960, "The cutting-plane method for solving convex programs",
Journal of the SIAM 8(4)); the units for the demands of one step are chosen greedily. Between a graph
that failed and one that passed, how many units to keep is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_EVALUATIONS", "fewest_kept"]

MOST_EVALUATIONS = 10
"""Of whole graphs, the one with every unit quantised among them."""

Demand = npt.NDArray[np.float64]  # of each unit: what it adds to the loss of some tokens

_MISLED = 2  # failures one after the other: then the interval is halved at least
_MOST_AT_LAST = 4  # failures with one unit less than what passed: then the search ends
# A gate is about the worst token and the estimate about a mean: before anything is known of their
# ratio.
_WORST_TO_MEAN = 4.0
# How far a graph that failed breaks its own demand, at the least: a graph is measured up to the first image
# that fails, so that its loss may be larger than what was seen.
_BREACH = 2.0
_LINEAR = 0.05  # of a cosine: a loss beyond this says nothing of small ones


def fewest_kept(
    loss_of: Callable[[frozenset[str]], float],
    ranked_again: Callable[[], Mapping[str, float]],
    estimates: Mapping[str, float],
    *,
    loss_of_none: float,
    allowed: float,
    most: int = MOST_EVALUATIONS - 1,
) -> frozenset[str] | None:
    """Which units to keep, so that the graph loses no more than is allowed.

    Args:
        loss_of: Evaluates the graph that keeps these: the most that a token's cosine is below 1;
            infinite where a value is not finite.
        ranked_again: What each unit adds to the mean loss of the tokens that are worst in the graph
            that was evaluated last.
        estimates: The same of the graph with none kept.
        loss_of_none: The loss with none kept, which is more than is allowed.
        allowed: The most that may be lost.
        most: Evaluations.

    Returns:
        The smallest set that was evaluated and passed; None if none did.
    """
    names = list(estimates)
    demands = [_demand(estimates, names, loss_of_none, np.ones(len(names), bool))]
    best: frozenset[str] | None = None
    tried: set[frozenset[str]] = set()
    failed, passed = 0, len(names) + 1  # keeping all may fail too
    failures, at_last = 0, 0  # one after the other; with one unit less than what passed
    for evaluation in range(most):
        order, number = _greedy(demands, allowed)
        middle = (failed + passed) // 2
        if evaluation == most - 1 and best is None:
            number = max(failed + 1, len(names) - 1)  # the last chance that any passes
        elif failed and best is not None:
            # How many is known better from these two than from the demands, which say which ones: of
            # demands, one that asks too much and one that asks too little take turns.
            number = middle
        elif failures >= _MISLED:
            number = max(number, middle)
        number = min(max(number, 1), passed - 1)
        units = [names[unit] for unit in order]
        while number < passed - 1 and frozenset(units[:number]) in tried:
            number += 1
        keep = frozenset(units[:number])
        if keep in tried:
            break  # the rankings have nothing else to propose
        tried.add(keep)
        quantized = np.ones(len(names), bool)
        quantized[order[:number]] = False
        loss = loss_of(keep)
        if loss <= allowed:
            best, passed, failures, at_last = keep, number, 0, 0
            expected = max(float(demand[quantized].sum()) for demand in demands)
            if loss < expected:
                demands = [demand * (loss / expected) for demand in demands]
        else:
            failed, failures = number, failures + 1
            at_last += number == passed - 1
        if passed == 1 or number == len(names) or at_last >= _MOST_AT_LAST:
            break
        if failures and evaluation < most - 1:
            least = _BREACH * allowed
            demands.append(_demand(ranked_again(), names, loss, quantized, least=least))
    return best


def _demand(
    estimates: Mapping[str, float],
    names: Sequence[str],
    loss: float,
    quantized: npt.NDArray[np.bool_],
    least: float = 0.0,
) -> Demand:
    """Estimates of a mean, so scaled that the quantised units together have the loss of the worst token.

    They have no less than `least`.
    """
    demand = np.array([estimates[name] for name in names], np.float64)
    total = float(demand[quantized].sum())
    if total <= 0:
        return demand
    ratio = loss / total if loss < _LINEAR else _WORST_TO_MEAN
    return demand * max(ratio, least / total)


def _greedy(demands: Sequence[Demand], allowed: float) -> tuple[list[int], int]:
    """Units in the order in which they are kept, and how many of them have to be."""
    table = np.stack(demands)  # [demands, units]
    left, number = table.sum(axis=1), None
    order: list[int] = []
    is_left = np.ones(table.shape[1], bool)
    while is_left.any():
        broken = left > allowed
        if not broken.any() and number is None:
            number = len(order)
        score = table[broken].sum(axis=0) if broken.any() else table.sum(axis=0)
        unit = int(np.argmax(np.where(is_left, score, -np.inf)))
        is_left[unit] = False
        order.append(unit)
        left = left - table[:, unit]
    return order, len(order) if number is None else number
