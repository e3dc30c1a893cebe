"""Compute capabilities: which GPU generation an engine is for."""

from __future__ import annotations

import re
from typing import Any

from mmvision_export.core.errors import EngineError

__all__ = ["parse_compute_capability", "supported_by_rtx"]


def parse_compute_capability(text: str) -> str:
    """`89`, `8.9`, `sm89` or `sm_89` -> `8.9`; `120` -> `12.0`.

    Raises:
        EngineError: The text is none of these.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+?)\.?(\d)", text.strip().lower())
    if match is None:
        raise EngineError(f"not a compute capability: {text!r}", hint="give it as 8.9 or 89")
    return f"{match[1]}.{match[2]}"


def supported_by_rtx(trt: Any) -> list[str]:
    """What a TensorRT-RTX module can build for, ascending."""
    names = [
        name.removeprefix("SM")
        for name in trt.ComputeCapability.__members__
        if name.startswith("SM")
    ]
    return sorted((parse_compute_capability(name) for name in names), key=float)
