"""What the tests serve with."""

from __future__ import annotations

from typing import Any

from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.triton_server.config import ServerSettings

__all__ = ["settings"]


def settings(**changes: Any) -> ServerSettings:
    """One instance on a CPU, but for the changes."""
    defaults: dict[str, Any] = {
        "backend": "onnxruntime-cpu",
        "threads": None,
        "instances": 1,
        "max_delay_ms": 5.0,
        "max_requests": 64,
        "resize_to_fit": False,
        "max_pixels": MAX_FILE_PIXELS,
    }
    return ServerSettings(**{**defaults, **changes})
