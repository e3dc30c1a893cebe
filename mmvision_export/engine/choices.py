"""What there is to choose from when building an engine, apart from the packages that do it."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["ATTENTION_WAYS", "AttentionWay", "TensorRTChoice"]

TensorRTChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]
"""TensorRT to build with; `auto` is the one that is installed."""

AttentionWay = Literal["auto", "plugin", "native", "packed"]
"""How an engine shall do attention; `auto` is the plugin where it can be, and otherwise native."""

ATTENTION_WAYS: tuple[AttentionWay, ...] = get_args(AttentionWay)
