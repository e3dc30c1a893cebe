"""How a run embeds, and what its tables depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import InputError
from mmvision_export.embed.output import TableFacts
from mmvision_export.embed.stored import STORED_TYPES, StoredType
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = [
    "DEFAULT_ROWS_PER_PART",
    "EmbedSettings",
    "identity_of_run",
    "model_sha256",
    "table_facts",
]

DEFAULT_ROWS_PER_PART = 64
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What a user chooses of a run, and its rows depend on.

    Attributes:
        dtype: Of the embeddings in the table.
        rows_per_part: Rows of a part.
        patches_per_call: Most patches of one call of the encoder; None for the encoder's own choice.
        resize_to_fit: Shrink an image that is too large for the engine.
        max_pixels: Most pixels of an image's file.
        draft: Decode a JPEG at a part of its size if it is much larger than its picture.

    Raises:
        InputError: A number is out of range.
    """

    dtype: StoredType = "bfloat16"
    rows_per_part: int = DEFAULT_ROWS_PER_PART
    patches_per_call: int | None = None
    resize_to_fit: bool = False
    max_pixels: int = MAX_FILE_PIXELS
    draft: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in STORED_TYPES:
            raise InputError(f"dtype must be one of {', '.join(STORED_TYPES)}, got {self.dtype!r}")
        for name in ("rows_per_part", "patches_per_call", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")

    def decoder(self, preprocessor: PreprocessorConfig) -> ImageDecoder:
        """What makes pictures."""
        return ImageDecoder(preprocessor, max_pixels=self.max_pixels, draft=self.draft)

    def budget(self, encoder: VisionEncoder) -> int:
        """Most patches of one call."""
        return self.patches_per_call or encoder.patches_per_call


def model_sha256(encoder: VisionEncoder) -> str:
    """Hash of the engine or graph that an encoder runs.

    Raises:
        ManifestError: Its record cannot be read any more.
    """
    facts = encoder.facts
    if facts.engine is not None:
        return EngineRecord.read(Path(facts.engine)).engine.sha256
    assert facts.model is not None
    assert facts.graph is not None
    return Manifest.read(Path(facts.model)).record_of(facts.graph).sha256


def table_facts(encoder: VisionEncoder, settings: EmbedSettings) -> TableFacts:
    """What every row of the table shares."""
    return TableFacts(
        dtype=settings.dtype,
        width=encoder.config.text_hidden_size,
        weights_sha256=encoder.facts.weights_sha256,
        model_sha256=model_sha256(encoder),
    )


def identity_of_run(encoder: VisionEncoder, settings: EmbedSettings) -> dict[str, Any]:
    """What the tables depend on but for the input, as a JSON object.

    A run with another may not add to them.
    """
    facts = table_facts(encoder, settings)
    return {
        "format": _FORMAT,
        "weights_sha256": facts.weights_sha256,
        "model_sha256": facts.model_sha256,
        "precision": encoder.facts.precision,
        "preprocessor": encoder.preprocessor_for(resize_to_fit=settings.resize_to_fit).to_dict(),
        **dataclasses.asdict(settings),
        "patches_per_call": settings.budget(encoder),
    }
