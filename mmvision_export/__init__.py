"""Export the MiniMax-M3-VL vision encoder to ONNX and TensorRT, and run it.

`VisionEncoder` is the deployed part; importing this package loads neither torch nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmvision_export.version import __version__

if TYPE_CHECKING:
    from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["VisionEncoder", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line and the exporter do not load a runtime they do not need.
    if name == "VisionEncoder":
        from mmvision_export.runtime.vision_encoder import VisionEncoder

        return VisionEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
