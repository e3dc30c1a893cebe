"""Token ids of MiniMax-M3's media, as its tokenizer has them."""

from __future__ import annotations

__all__ = ["IMAGE", "VIDEO", "VISION_END", "VISION_START"]

IMAGE = 200025
VIDEO = 200026
VISION_START = 200029
VISION_END = 200030
