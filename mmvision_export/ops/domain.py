"""Names of the custom operators' domain, which are the TensorRT plugins' namespace and version too."""

from __future__ import annotations

__all__ = ["DOMAIN", "OP_VERSION"]

DOMAIN = "mmvision"
OP_VERSION = 1
