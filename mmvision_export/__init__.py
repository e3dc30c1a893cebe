"""Export the MiniMax-M3-VL vision encoder to ONNX and TensorRT, and run it.

`VisionEncoder` is the deployed part; importing this package loads neither torch nor onnx.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mmvision_export.version import __version__

if TYPE_CHECKING:
    from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["VisionEncoder", "__version__"]

# ONNX Runtime's wheel looks up a host of Microsoft's, and writes a device id and events into the
# user's cache. It reads this variable once, when it is loaded: no module of this package, nor a
# library that one imports, can load it before this line. Who sets 0 has asked for telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line and the exporter do not load a runtime they do
    # not need.
    if name == "VisionEncoder":
        from mmvision_export.runtime.vision_encoder import VisionEncoder

        return VisionEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
