"""What there is to choose from when building an engine, apart from the packages that do it."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["ATTENTION_WAYS", "SLOT_WAYS", "AttentionWay", "TensorRTChoice"]

TensorRTChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]
"""TensorRT to build with; `auto` is the one that is installed."""

AttentionWay = Literal["auto", "plugin", "packed", "uniform", "equal", "native"]
"""How an engine shall do attention.

`auto` is the plugin where it can be, otherwise packed where TensorRT has it, otherwise uniform where the
sizes are slots or none were given, and otherwise native.
"""

ATTENTION_WAYS: tuple[AttentionWay, ...] = get_args(AttentionWay)

SLOT_WAYS: dict[AttentionWay, int] = {"uniform": 2, "equal": 1}
"""Ways whose launches are images in slots of equal length -> rows of `grid_thw` for each slot."""
