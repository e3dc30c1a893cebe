"""Photographs to calibrate on, and photographs to check with that calibration has not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_pictures,
    picture_from_image,
)
from mmvision_export.quantize.evidence import LEAST_HELD_OUT
from mmvision_export.quantize.statistics import Batch

__all__ = ["Split", "batches_of", "split"]

# Parts of a picture (left, top, right, bottom as shares of it) and the size they are brought to.
_VIEWS = (
    ((0.0, 0.0, 1.0, 1.0), 1.0),
    ((0.0, 0.0, 1.0, 1.0), 0.5),
    ((0.25, 0.25, 0.75, 0.75), 1.0),
    ((0.0, 0.0, 0.5, 0.5), 1.0),
    ((0.5, 0.5, 1.0, 1.0), 1.0),
    ((0.5, 0.0, 1.0, 0.5), 1.0),
    ((0.0, 0.5, 0.5, 1.0), 1.0),
    ((0.0, 0.0, 1.0, 1.0), 0.7),
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which images serve for what.

    Attributes:
        calibration: Those that ranges are measured on.
        held_out: Those that calibration does not see.
        views: Crops and sizes of each image held out, the whole one among them.
    """

    calibration: tuple[Path, ...]
    held_out: tuple[Path, ...]
    views: int


def split(images: Sequence[Path]) -> Split:
    """Hold out a quarter of the images, and no fewer than eight where half of them suffice for that.

    With fewer than sixteen images, half of them are held out, in as many crops and sizes as make
    eight.

    Args:
        images: At least two.
    """
    wanted = max(-(-len(images) // 4), min(LEAST_HELD_OUT, len(images) // 2))
    # Spread over the order given: neighbours in a folder are often alike.
    chosen = {(2 * index + 1) * len(images) // (2 * wanted) for index in range(wanted)}
    return Split(
        tuple(image for index, image in enumerate(images) if index not in chosen),
        tuple(image for index, image in enumerate(images) if index in chosen),
        -(-LEAST_HELD_OUT // wanted),
    )


def batches_of(
    images: Sequence[Path], config: PreprocessorConfig, *, views: int = 1
) -> list[Batch]:
    """Each view of each image as a batch of its own.

    Args:
        images: Files.
        config: The preprocessing.
        views: Of each, up to eight; the first is the whole image.

    Raises:
        InputError: A file cannot be used.
    """
    decoder = ImageDecoder(config, draft=False)
    batches = []
    for path in images:
        picture = decoder.picture(path)
        for view in _views(picture, config, views):
            batch = batch_from_pictures([view], config)
            batches.append((batch.pixel_values, np.asarray(batch.grid.rows)))
    return batches


def _views(picture: Image.Image, config: PreprocessorConfig, count: int) -> list[Image.Image]:
    views = [picture]
    for (left, top, right, bottom), share in _VIEWS[1:count]:
        width, height = picture.size
        part = picture.crop(
            (round(left * width), round(top * height), round(right * width), round(bottom * height))
        )
        size = (max(1, round(share * part.width)), max(1, round(share * part.height)))
        views.append(picture_from_image(part.resize(size, Image.Resampling.BICUBIC), config))
    return views
