"""An embedder for servers that make their encoder without arguments.

They name a class or a package, and pass nothing on: what we need comes from the environment.

| variable | what |
| --- | --- |
| `MMVISION_MODEL` | the model directory, or an engine file |
| `MMVISION_BACKEND` | a name of `BACKENDS`; `auto` if missing |
| `MMVISION_EMBEDS_CACHE` | a folder for the cache; none if missing |
| `MMVISION_EMBEDS_CACHE_BYTES` | most bytes of that folder |
"""

from __future__ import annotations

import os
from pathlib import Path

from mmvision_export.core.errors import ConfigError
from mmvision_export.integrations.embeds_cache import DISK_BYTES, EmbedsCache
from mmvision_export.integrations.image_embedder import ImageEmbedder
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["embedder_from_environment", "positive_number"]


def embedder_from_environment() -> ImageEmbedder:
    """Open what the variables name. Close it with `embedder.encoder.close()`.

    Raises:
        ConfigError: `MMVISION_MODEL` is missing, or a number is none.
        MmvisionError: The model cannot be opened, or the cache's folder cannot be written to.
    """
    model = os.environ.get("MMVISION_MODEL")
    if not model:
        raise ConfigError(
            "MMVISION_MODEL is not set",
            hint="set it to a model directory, as MMVISION_MODEL=engines/MiniMax-M3",
        )
    folder = os.environ.get("MMVISION_EMBEDS_CACHE")
    cache = None
    if folder:
        most = positive_number("MMVISION_EMBEDS_CACHE_BYTES", default=DISK_BYTES)
        cache = EmbedsCache(folder=folder, disk_bytes=most)
    backend = os.environ.get("MMVISION_BACKEND", "auto")
    return ImageEmbedder(VisionEncoder.open(Path(model), backend=backend), cache=cache)


def positive_number(variable: str, *, default: int) -> int:
    """The whole number that a variable of the environment has.

    Raises:
        ConfigError: It has something else.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{variable} must be a positive whole number, got {text!r}")
    return int(text)
