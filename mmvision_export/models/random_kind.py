"""The kinds of random weights, apart from torch, which makes them."""

from __future__ import annotations

from typing import Literal

__all__ = ["RandomKind"]

RandomKind = Literal["plain", "outliers"]
"""Plain, or with the outlier channels and massive activations of trained vision transformers."""
