"""What there is to choose from when quantising, apart from the packages that do it."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["CALIBRATION_METHODS", "FLAVOURS", "CalibrationMethod", "Flavour"]

Flavour = Literal["int8", "fp8", "cpu-int8"]
"""`int8` and `fp8` for TensorRT, `cpu-int8` for ONNX Runtime's CPU provider."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

CalibrationMethod = Literal["minmax", "percentile", "entropy"]
"""How ranges are chosen."""

CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)
