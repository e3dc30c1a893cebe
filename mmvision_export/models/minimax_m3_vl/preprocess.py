"""Images to patches, as the checkpoint's processor does it, with Pillow and NumPy only.

The grid is the processor's exactly. Pixels differ from it by what Pillow's bicubic filter differs
from torchvision's, both antialiased on 8-bit images: a fraction of a level on average.

An image becomes a picture, 8-bit RGB of the size that its grid says, which is small; pictures
become patches in one copy, into the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.core.ahead import mapped, worker_threads
from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image, upright
from mmvision_export.models.minimax_m3_vl.preprocessor_config import (
    PREPROCESSOR,
    PreprocessorConfig,
    resized,
)

__all__ = [
    "PREPROCESSOR",
    "PreprocessorConfig",
    "batch_from_images",
    "batch_from_pictures",
    "independent",
    "patches_from_frames",
    "patches_from_image",
    "picture_from_image",
    "resized",
]

# So few that what is looked up is still in the cache when it is copied.
_BLOCK_PATCHES = 512


def picture_from_image(image: Image.Image, config: PreprocessorConfig) -> Image.Image:
    """An image at the size that the encoder sees.

    Args:
        image: Any Pillow image; turned upright by its EXIF orientation, and converted by
            `rgb_from_image`.
        config: The preprocessing.

    Returns:
        8-bit RGB, both sides a multiple of `config.factor`.

    Raises:
        InputError: See `resized`, `upright` and `rgb_from_image`.
    """
    image = rgb_from_image(upright(image))
    height, width = resized(image.height, image.width, config)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def patches_from_image(
    image: Image.Image, config: PreprocessorConfig
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Resize, normalise and cut one still image.

    Args:
        image: See `picture_from_image`.
        config: The preprocessing.

    Returns:
        pixel_values `[h*w, 3*T*P*P]` float32, in merge-block order, each patch flattened in
        (channel, frame, row, column) order; and its grid row (1, h, w), in patches.

    Raises:
        InputError: See `picture_from_image`.
    """
    batch = batch_from_pictures([picture_from_image(image, config)], config)
    return batch.pixel_values, batch.grid.tuples()[0]


def patches_from_frames(
    frames: Sequence[Image.Image], config: PreprocessorConfig
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Resize, normalise and cut consecutive frames, the last one repeated to fill a temporal patch.

    Args:
        frames: 8-bit RGB, all of one size.
        config: The preprocessing.

    Returns:
        pixel_values `[t*h*w, 3*T*P*P]` float32, temporal patches outermost, else as of
        `patches_from_image`; and the grid row (t, h, w), in patches.

    Raises:
        InputError: See `resized`.
    """
    height, width = resized(frames[0].height, frames[0].width, config)
    t, h, w = (
        -(-len(frames) // config.temporal_patch_size),
        height // config.patch_size,
        width // config.patch_size,
    )
    patches = np.empty((t * h * w, _patch_dim(config)), dtype=np.float32)
    pictures = (
        frame
        if frame.size == (width, height)
        else frame.resize((width, height), Image.Resampling.BICUBIC)
        for frame in frames
    )
    _fill(patches, list(pictures), config, config.normalised_levels)
    return patches, (t, h, w)


def batch_from_images(
    images: Iterable[Image.Image],
    config: PreprocessorConfig,
    *,
    names: Sequence[str] | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> PackedBatch:
    """Pack several images, of any sizes, into one batch of patches.

    The images of a list are worked on by several threads, those of an iterator one after the other
    as they come.

    Args:
        images: Any Pillow images.
        config: The preprocessing.
        names: What an error calls each of them; `image 0` and so on if None.
        dtype: See `batch_from_pictures`.

    Raises:
        InputError: No images, or one cannot be processed; the message says which.
    """

    def picture(indexed: tuple[int, Image.Image]) -> Image.Image:
        index, image = indexed
        try:
            return picture_from_image(image, config)
        except Exception as error:  # a lazily opened image is decoded here
            name = f"image {index}" if names is None else names[index]
            raise InputError(f"{name}: {error}", hint=getattr(error, "hint", None)) from error

    if isinstance(images, (list, tuple)) and independent(images):
        pictures = mapped(picture, list(enumerate(images)), threads=worker_threads())
    else:
        pictures = [picture(indexed) for indexed in enumerate(images)]
    return batch_from_pictures(pictures, config, dtype=dtype)


def batch_from_pictures(
    pictures: Sequence[Image.Image],
    config: PreprocessorConfig,
    *,
    dtype: npt.DTypeLike = np.float32,
) -> PackedBatch:
    """Normalise and cut pictures into one batch.

    Args:
        pictures: 8-bit RGB of the sizes of `resized`, a grid row for each.
        config: The preprocessing.
        dtype: The graph's float type. A level that overflows in it leaves the batch in float32, for
            `PackedBatch.of_type` to say which value it is.

    Raises:
        InputError: There are none.
    """
    if not pictures:
        raise InputError("no images were given", reason="missing")
    side = config.patch_size
    rows = [(1, picture.height // side, picture.width // side) for picture in pictures]
    grid = PackedGrid(np.array(rows, dtype=np.int64), config.merge_size**2)
    with np.errstate(over="ignore"):
        table = config.normalised_levels.astype(dtype)
    if not np.isfinite(table).all():
        table = config.normalised_levels
    pixel_values = np.empty((grid.num_patches, _patch_dim(config)), dtype=table.dtype)

    def fill(index: int) -> None:
        patches = pixel_values[grid.bounds[index] : grid.bounds[index + 1]]
        _fill(patches, [pictures[index]], config, table)

    mapped(fill, range(len(pictures)), threads=worker_threads())
    return PackedBatch(pixel_values, grid)


def _patch_dim(config: PreprocessorConfig) -> int:
    return 3 * config.temporal_patch_size * config.patch_size**2


def independent(images: Sequence[Image.Image]) -> bool:
    """Whether no two of them share what decoding one of them moves."""
    files = [file for image in images if (file := getattr(image, "fp", None)) is not None]
    return all(len(set(map(id, shared))) == len(shared) for shared in (images, files))


def _fill(
    patches: npt.NDArray[np.floating],
    pictures: Sequence[Image.Image],
    config: PreprocessorConfig,
    table: npt.NDArray[np.floating],
) -> None:
    """Write the patches of consecutive pictures of one size.

    Args:
        patches: `[t*h*w, 3*T*P*P]`, written.
        pictures: The frames, 8-bit RGB; the last one fills what is left of its temporal patch.
        config: The preprocessing.
        table: `[3, 256]`, what each level becomes, of the type of `patches`.
    """
    merge, side, depth = config.merge_size, config.patch_size, config.temporal_patch_size
    h, w = pictures[0].height // side, pictures[0].width // side
    by_frame = patches.reshape(-1, h * w, 3, depth, side * side)
    for index, picture in enumerate(pictures):
        levels = np.asarray(picture, dtype=np.uint8).reshape(
            h // merge, merge, side, w // merge, merge, side, 3
        )
        # [block_row, row, y, block_column, column, x, C] -> [.., row, column, C, y, x] -> [N, C,
        # P*P]
        levels = levels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, side * side)
        # The last frame fills what is left of its temporal patch, all of it for a still image.
        depths = slice(index % depth, None if index == len(pictures) - 1 else index % depth + 1)
        for first in range(0, h * w, _BLOCK_PATCHES):
            rows = slice(first, first + _BLOCK_PATCHES)
            for channel in range(3):
                values = table[channel].take(levels[rows, channel])
                by_frame[index // depth, rows, channel, depths] = values[:, None]
