"""Under which key an image's embeddings are cached.

A key is the SHA-256 of everything that the embeddings depend on: the image, its preprocessing, the
weights, and what runs them. Two engines of one file of weights differ in the last bits, so that the
weights alone would mix them up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["CacheKeys"]

# Raise it when preprocessing changes what it makes of an image.
_FORM = 1
# Facts that say how fast something runs, or where it lies, and not what it computes.
_NOT_THE_FUNCTION = {
    "model",
    "engine",
    "splitting",
    "cuda_graphs",
    "captures_refused",
    "profiles",
    "streams",
    "plugin_library",
    "runtime_cache",
    "kernel_library",
    "threads",
    "chosen",
    "passed_over",
}


@dataclasses.dataclass(frozen=True)
class CacheKeys:
    """Makes the keys of one encoder. Each is 64 hexadecimal digits.

    Attributes:
        of_encoder: Digest of what runs: weights, precision, graph, runtime and its version.
        of_preprocessing: Digest of that and of how images become patches.
    """

    of_encoder: bytes
    of_preprocessing: bytes

    @classmethod
    def for_encoder(cls, encoder: VisionEncoder, preprocessor: PreprocessorConfig) -> CacheKeys:
        """The keys of an encoder that preprocesses in this way."""
        facts = dataclasses.asdict(encoder.facts)
        function = {name: facts[name] for name in facts if name not in _NOT_THE_FUNCTION}
        runs = _digest(
            "encoder",
            {
                "form": _FORM,
                "function": function,
                "dtype": encoder.dtype.name,
                "config": dataclasses.asdict(encoder.config),
            },
        )
        # Another Pillow may decode and resize a little differently.
        steps = {"pillow": PIL.__version__, "steps": dataclasses.asdict(preprocessor)}
        return cls(runs, _digest("preprocessing", steps, runs))

    def of_file(self, content: bytes) -> str:
        """Of an image file by its bytes, before anything of it is decoded."""
        return _digest("file", {}, self.of_preprocessing, content).hex()

    def of_picture(self, image: Image.Image) -> str:
        """Of an image by its pixels.

        Args:
            image: Upright, in 8-bit RGB, at its full size.
        """
        what = {"size": list(image.size), "mode": image.mode}
        return _digest("pixels", what, self.of_preprocessing, image.tobytes()).hex()

    def of_patches(self, pixel_values: npt.NDArray[np.floating], row: tuple[int, int, int]) -> str:
        """Of an image or a segment that somebody else preprocessed.

        Args:
            pixel_values: `[t*h*w, patch_dim]`, C-contiguous, of the encoder's float type.
            row: (t, h, w) in patches.
        """
        what = {"grid_thw": list(row), "dtype": pixel_values.dtype.name}
        return _digest("patches", what, self.of_encoder, pixel_values.data.cast("B")).hex()


def _digest(kind: str, what: dict[str, Any], *content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    # JSON has no zero byte, and of the content all but the last has a fixed length: no two inputs
    # give the same bytes.
    digest.update(json.dumps([kind, what], sort_keys=True, default=str).encode() + b"\0")
    for piece in content:
        digest.update(piece)
    return digest.digest()
