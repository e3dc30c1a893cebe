"""Where an error comes from: the first stage that is further off than its precision explains."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from mmvision_export.core.metrics import Metrics

__all__ = ["EXCESS", "Jump", "StageDistance", "expected_errors", "first_jump"]

EXCESS = 2.0
"""How many times the expected error a stage may be off. It is what the gates of float16 and bfloat16 allow at
the output, so that an output that fails by it always has a first stage to name. Healthy graphs measure 0.9 to 1.2."""


@dataclasses.dataclass(frozen=True)
class StageDistance:
    """How far a stage's output lies from the float64 encoder's.

    Attributes:
        stage: Name of the stage.
        distance: Between the outputs; tokens are patches up to the projector, image tokens after
            the merger.
        largest: Largest magnitude of the output; infinite if it overflowed.
        headroom: Largest finite value of the output's type over `largest`.
    """

    stage: str
    distance: Metrics
    largest: float
    headroom: float


@dataclasses.dataclass(frozen=True)
class Jump:
    """The first stage where the error jumps.

    Attributes:
        stage: Name of the stage.
        relative_l2: Its error; NaN where values are not finite.
        expected: The error that its precision explains there; None if values are not finite.
        reason: Both in words.
    """

    stage: str
    relative_l2: float
    expected: float | None
    reason: str


def expected_errors(
    stages: Sequence[StageDistance], eager: Sequence[StageDistance] | None
) -> list[float | None]:
    """The error that a graph's precision explains at each stage, as relative L2.

    With eager PyTorch in the same precision beside it, that is its error at the same stage: both
    round the same tensors to the same type. A quantised graph has no such counterpart. There,
    rounding errors of different stages being independent, each stage adds its own in quadrature,
    `e_k**2 = e_(k-1)**2 + own_k**2`; expected is what the stage before has, with the median of all
    stages' own added. The median holds as long as fewer than half are at fault.

    Args:
        stages: In order of computation.
        eager: The same stages of eager PyTorch, or None.

    Returns:
        Per stage; None where PyTorch is not finite either, so that nothing can be expected.
    """
    if eager is not None:
        errors_by_stage = {row.stage: row.distance for row in eager}
        beside = [errors_by_stage[row.stage] for row in stages]
        return [None if distance.non_finite else distance.relative_l2 for distance in beside]
    errors = [0.0, *(row.distance.relative_l2 for row in stages)]
    own = [max(0.0, after**2 - before**2) ** 0.5 for before, after in itertools.pairwise(errors)]
    finite = [error for error in own if math.isfinite(error)]
    # There are none if the first overflows, or if the stages have no values of their own, as in a
    # CPU flavour.
    typical = statistics.median(finite) if finite else 0.0
    return [math.hypot(before, typical) for before in errors[:-1]]


def first_jump(
    stages: Sequence[StageDistance], eager: Sequence[StageDistance] | None
) -> Jump | None:
    """The first stage that is not finite, or has over `EXCESS` times the expected error.

    Args:
        stages: In order of computation.
        eager: The same stages of eager PyTorch in the same precision, or None for a quantised
            graph.
    """
    source = "the stages before it explain" if eager is None else "PyTorch's in the same precision"
    for row, expected in zip(stages, expected_errors(stages, eager), strict=True):
        error = row.distance.relative_l2
        if row.distance.non_finite:
            reason = f"{row.distance.non_finite} values are not finite"
            if expected is None:
                reason += ", and PyTorch's are not either: this type lacks the range for this model"
            return Jump(row.stage, error, None, reason)
        # Written so that NaN is a jump.
        if expected is not None and not error <= EXCESS * expected:
            times = f"{error / expected:.3g} x" if expected else "beyond"
            return Jump(
                row.stage,
                error,
                expected,
                f"relative L2 {error:.1e} is {times} {source}, {expected:.1e}",
            )
    return None
