"""Numbers that come from JSON, whose integers have no bound."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

__all__ = ["is_finite_number"]


def is_finite_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float holds: no integer of 400 digits, NaN or bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
