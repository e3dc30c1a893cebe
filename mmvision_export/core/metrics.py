"""How far two results lie apart."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

__all__ = ["Metrics", "metrics", "token_errors"]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Distance of a result from its reference.

    Attributes:
        max_abs: Largest absolute difference.
        relative_l2: L2 norm of the difference over that of the reference.
        min_cosine: Smallest cosine similarity of a token with its reference.
        non_finite: Values of the result or of the reference that are NaN or infinite; if there are
            any, the other figures are NaN.
    """

    max_abs: float
    relative_l2: float
    min_cosine: float
    non_finite: int

    def to_dict(self) -> dict[str, float | None]:
        """As JSON values: NaN, which JSON does not have, is None."""
        return {
            name: None if math.isnan(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


def metrics(result: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> Metrics:
    """Compare in float64.

    Args:
        result: `[tokens, channels]`.
        reference: Same shape.
    """
    if result.shape != reference.shape:
        raise ValueError(f"shapes differ: {result.shape} and {reference.shape}")
    a, b = result.astype(np.float64), reference.astype(np.float64)
    non_finite = int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum())
    if non_finite:
        return Metrics(float("nan"), float("nan"), float("nan"), non_finite)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return Metrics(
        max_abs=float(np.abs(a - b).max()),
        relative_l2=float(
            np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny)
        ),
        min_cosine=float(min(1.0, cosine.min())),
        non_finite=0,
    )


def token_errors(
    result: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Relative L2 difference of each token, `[tokens]` float64; NaN where a value is not finite.

    Args:
        result: `[tokens, channels]`.
        reference: Same shape.
    """
    a, b = result.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(b, axis=-1)
        errors: npt.NDArray[np.float64] = np.linalg.norm(a - b, axis=-1) / np.maximum(
            norms, np.finfo(np.float64).tiny
        )
    errors[~np.isfinite(errors)] = np.nan
    return errors
