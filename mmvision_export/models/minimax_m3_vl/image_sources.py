"""Images as Python callers have them: of Pillow, as files, as arrays; one of them or several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.core.ahead import mapped, worker_threads
from mmvision_export.core.errors import InputError, MmvisionError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_images,
    batch_from_pictures,
    picture_from_image,
)

__all__ = ["ImageSource", "batch_from_sources", "image_from_array"]

ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str] | npt.NDArray[np.uint8] | Any"
"""A Pillow image, the path of an image file, or an array (NumPy, torch or anything with DLPack) of uint8,
`[height, width, 3]` in RGB, `[height, width, 4]` in RGBA or `[height, width]` in grey."""

_CHANNELS = (3, 4)


def batch_from_sources(
    images: ImageSource | Iterable[ImageSource],
    config: PreprocessorConfig,
    *,
    dtype: npt.DTypeLike = np.float32,
) -> PackedBatch:
    """Pack images into one batch of patches.

    Files are decoded as `mmvision run` decodes them, by several threads and from drafts.

    Args:
        images: One image, or several.
        config: The preprocessing.
        dtype: The graph's float type.

    Raises:
        InputError: No images, or one cannot be used; the message says which.
    """
    if _is_one(images):
        given: Sequence[Any] = [images]
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray)):
        given = list(images)
    else:
        raise _not_an_image(images)
    if all(isinstance(image, Image.Image) for image in given):
        return batch_from_images(given, config, dtype=dtype)
    decoder = ImageDecoder(config)

    def picture(indexed: tuple[int, ImageSource]) -> Image.Image:
        index, image = indexed
        if isinstance(image, (str, os.PathLike)):
            return decoder.picture(Path(image))
        try:
            opened = image if isinstance(image, Image.Image) else image_from_array(image)
            return picture_from_image(opened, config)
        except Exception as error:  # a lazily opened image is decoded here
            said = error.message if isinstance(error, MmvisionError) else error
            raise InputError(f"image {index}: {said}", hint=getattr(error, "hint", None)) from error

    pictures = mapped(picture, list(enumerate(given)), threads=worker_threads())
    return batch_from_pictures(pictures, config, dtype=dtype)


def image_from_array(array: Any) -> Image.Image:
    """An array of uint8 as an image.

    Args:
        array: `[height, width, 3]` in RGB, `[height, width, 4]` in RGBA, or `[height, width]` in grey.

    Raises:
        InputError: It is no array, of another type, or of another shape.
    """
    if not hasattr(array, "__array__") and not hasattr(array, "__dlpack__"):
        raise _not_an_image(array)
    try:
        levels = np.asarray(array if hasattr(array, "__array__") else np.from_dlpack(array))
    except Exception as error:  # of the caller's library: on a device, or with a gradient
        raise InputError(f"a {type(array).__name__} cannot be read on the CPU: {error}") from error
    is_image = levels.ndim == 2 or (levels.ndim == 3 and levels.shape[2] in _CHANNELS)
    if levels.dtype != np.uint8 or not is_image or not levels.size:
        raise InputError(
            "an image as an array must be uint8 [height, width, 3], [height, width, 4] or [height, width], "
            f"got {levels.dtype} {list(levels.shape)}",
            hint="normalised patches go to encoder(pixel_values, grid_thw)",
        )
    return Image.fromarray(np.ascontiguousarray(levels))


def _is_one(images: Any) -> bool:
    if isinstance(images, (Image.Image, str, os.PathLike)):
        return True
    # A 4-dimensional array is a batch, and gives its images when it is iterated over.
    return hasattr(images, "ndim") and images.ndim <= 3


def _not_an_image(given: Any) -> InputError:
    hint = (
        "open encoded bytes with PIL.Image.open(io.BytesIO(data))"
        if isinstance(given, (bytes, bytearray))
        else None
    )
    return InputError(
        f"an image must be a Pillow image, a path or an array, got a {type(given).__name__}",
        hint=hint,
    )
