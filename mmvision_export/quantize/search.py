"""The fewest units to keep, in a bounded number of whole graphs.

What a unit adds to the loss depends on the token, and a gate is about the worst one. So units are ranked
for the worst tokens of each image of a sample: first of those with every unit quantised, then of those in each
graph that failed. Each image makes a demand: the units that are quantised may together lose its tokens no
more than is allowed. The units to keep are chosen so that all demands hold. A graph that fails adds
demands that the graph breaks; a graph that passes shows by how much the demands ask too much.

This is a cutting-plane method (Kelley 1960, "The cutting-plane method for solving convex programs",
Journal of the SIAM 8(4)); the units for the demands of one step are chosen greedily. Between a graph
that failed and one that passed, how many units to keep is interpolated from their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mmvision_export.quantize.ranking import LINEAR, Ranking

__all__ = ["MOST_EVALUATIONS", "fewest_kept"]

MOST_EVALUATIONS = 10
"""Of whole graphs, the one with every unit quantised among them."""

Demands = npt.NDArray[np.float64]  # [images, units]: what each unit adds to the loss of some tokens
_Tried = tuple[int, float]  # how many units were kept, and the loss

_MISLED = 2  # failures one after the other: then the interval is halved at least
_MOST_NEAR = 3  # evaluations with hardly fewer units than what passed: then the search ends
# A gate is about the worst token and the estimate about a mean: before anything is known of their
# ratio.
_WORST_TO_MEAN = 2.0
# How far a graph that failed breaks the demands, at the least: a graph is measured up to the first image
# that fails, so that its loss may be larger than what was seen.
_BREACH = 2.0
_STEP = 0.05  # of the units kept: fewer than that are hardly worth a graph


def fewest_kept(
    loss_of: Callable[[frozenset[str]], float],
    ranked_again: Callable[[], Ranking],
    names: Sequence[str],
    ranking: Ranking,
    *,
    allowed: float,
    most: int = MOST_EVALUATIONS - 1,
) -> frozenset[str] | None:
    """Which units to keep, so that the graph loses no more than is allowed.

    Args:
        loss_of: Evaluates the graph that keeps these: the most that a token's cosine is below 1;
            infinite where a value is not finite.
        ranked_again: Ranks for the graph that was evaluated last.
        names: Of the units.
        ranking: For the graph with none kept, which loses more than is allowed.
        allowed: The most that may be lost.
        most: Evaluations.

    Returns:
        The smallest set that was evaluated and passed; None if none did.
    """
    demands = _demands(ranking, np.ones(len(names), bool))
    best: frozenset[str] | None = None
    tried: set[frozenset[str]] = set()
    failed: _Tried = 0, math.inf
    passed: _Tried = len(names) + 1, 0.0  # keeping all may fail too
    failures = 0  # one after the other
    near = 0  # evaluations with hardly fewer units than what passed
    for evaluation in range(most):
        order, number = _greedy(demands, allowed)
        middle = (failed[0] + passed[0]) // 2
        worthwhile = math.floor((1 - _STEP) * passed[0])
        if evaluation == most - 1 and best is None:
            number = max(failed[0] + 1, len(names) - 1)  # the last chance that any passes
        elif best is not None and failed[0]:
            # How many is known better from two graphs than from the demands, which say which ones: of
            # demands, one that asks too much and one that asks too little take turns.
            number = _between(failed, passed, allowed) if failures < _MISLED else middle
        elif best is not None:
            number = min(number, worthwhile)
        elif failures >= _MISLED:
            number = max(number, middle)
        number = min(max(number, 1), passed[0] - 1)
        units = [names[unit] for unit in order]
        while number < passed[0] - 1 and frozenset(units[:number]) in tried:
            number += 1
        keep = frozenset(units[:number])
        if keep in tried:
            break  # the rankings have nothing else to propose
        tried.add(keep)
        quantized = np.ones(len(names), bool)
        quantized[order[:number]] = False
        loss = loss_of(keep)
        near += best is not None and number > worthwhile
        if loss <= allowed:
            best, passed, failures = keep, (number, loss), 0
            if failed[0] >= number:  # of other units
                failed = 0, math.inf
            expected = float(demands[:, quantized].sum(axis=1).max())
            if loss < expected:
                demands = demands * (loss / expected)
        else:
            failed, failures = (number, loss), failures + 1
        if passed[0] == 1 or number == len(names) or near >= _MOST_NEAR:
            break
        if failures and evaluation < most - 1:
            new = _demands(ranked_again(), quantized)
            largest = float(new[:, quantized].sum(axis=1).max())
            if 0 < largest < _BREACH * allowed:
                new = new * (_BREACH * allowed / largest)
            demands = np.concatenate([demands, new])
    return best


def _between(failed: _Tried, passed: _Tried, allowed: float) -> int:
    """How many units lose as much as is allowed, if the logarithm of the loss is linear between the two."""
    if not 0 < passed[1] < failed[1] < LINEAR:
        return (failed[0] + passed[0]) // 2
    part = math.log(failed[1] / allowed) / math.log(failed[1] / passed[1])
    return failed[0] + max(1, math.ceil(part * (passed[0] - failed[0])))


def _demands(ranking: Ranking, quantized: npt.NDArray[np.bool_]) -> Demands:
    demands = ranking.losses(quantized)
    demands[~ranking.is_linear] *= _WORST_TO_MEAN
    return demands


def _greedy(demands: Demands, allowed: float) -> tuple[list[int], int]:
    """Units in the order in which they are kept, and how many of them have to be."""
    left, number = demands.sum(axis=1), None
    order: list[int] = []
    is_left = np.ones(demands.shape[1], bool)
    while is_left.any():
        broken = left > allowed
        if not broken.any() and number is None:
            number = len(order)
        score = demands[broken].sum(axis=0) if broken.any() else demands.sum(axis=0)
        unit = int(np.argmax(np.where(is_left, score, -np.inf)))
        is_left[unit] = False
        order.append(unit)
        left = left - demands[:, unit]
    return order, len(order) if number is None else number
