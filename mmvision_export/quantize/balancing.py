"""Balancing: a layer norm's large channels go into the weights that read them.

Judged on the sample rows, by the error that 8 bits leave in the unit's own products.

References:
    Xiao et al. 2023, "SmoothQuant", arXiv:2211.10438, equation 4: what makes a layer norm's output
    hard to quantise, a few large channels, is moved into the weights, `x / s` and `W * s` with `s =
    max|x|**a / max|W|**(1 - a)`. The layer norm absorbs `1 / s`, so that it costs nothing when
    running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from mmvision_export.quantize.formats import EightBitFormat, scale_from_magnitude
from mmvision_export.quantize.statistics import Samples
from mmvision_export.quantize.units import Unit

__all__ = ["Rounding", "RoundingFor", "divisor_of", "static_rounding", "token_rounding"]

Array = npt.NDArray[np.float32]
Rounding = Callable[[Array], Array]
"""What a runtime makes of the rows `[N, in]` that it quantises."""

RoundingFor = Callable[[EightBitFormat, float], Rounding]
"""The rounding to a format of a tensor whose largest magnitude is given."""

BALANCES = (0.0, 0.25, 0.5, 0.75)
"""Exponents tried; 0 leaves the layer norm as it is."""


def static_rounding(kind: EightBitFormat, magnitude: float) -> Rounding:
    """One scale for the whole tensor, chosen by calibration."""
    scale = scale_from_magnitude(magnitude, kind.maximum)
    return lambda rows: kind.rounded(rows, scale)


def token_rounding(kind: EightBitFormat, _: float) -> Rounding:
    """One scale for each row, from its own largest magnitude whatever the tensor's is."""
    tiny = np.float32(np.finfo(np.float32).tiny)
    return lambda rows: kind.rounded(
        rows, np.maximum(np.abs(rows).max(axis=1, keepdims=True), tiny) / kind.maximum
    )


def _error(
    rows: Array, weight: Array, kind: EightBitFormat, rounding: Rounding
) -> tuple[Array, Array]:
    """Product and its error, `[N, out]` each."""
    exact = rows @ weight.T
    return exact, rounding(rows) @ kind.rounded_weight(weight).T - exact


def divisor_of(
    unit: Unit,
    found: Samples,
    weights: Mapping[str, Array],
    kind: EightBitFormat,
    rounding_for: RoundingFor,
) -> Array | None:
    """What each channel of a layer norm's output is best divided by, `[in]`; None if by nothing."""
    if not unit.normed:
        return None
    heaviest = np.max(
        [np.abs(weights[linear.weight]).max(axis=0) for linear in unit.linears], axis=0
    )
    best, chosen = np.inf, None
    for exponent in BALANCES:
        if exponent:
            divisor = np.maximum(found.magnitude, 1e-5) ** exponent / np.maximum(
                heaviest, 1e-5
            ) ** (1 - exponent)
            divisor = np.clip(divisor / np.median(divisor), 1e-2, 1e2).astype(np.float32)
        else:
            divisor = np.ones_like(found.magnitude)
        magnitude = float((found.magnitude / divisor).max())
        rounding = rounding_for(kind, magnitude)
        squares = 0.0
        for linear in unit.linears:
            exact, error = _error(
                found.rows / divisor, weights[linear.weight] * divisor, kind, rounding
            )
            squares += float((error**2).sum() / (exact**2).sum())
        if squares < best:
            best, chosen = squares, divisor if exponent else None
    return chosen
