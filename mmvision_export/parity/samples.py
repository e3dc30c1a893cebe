"""What graphs are compared on: real images, patches from a file, or batches of sample grids."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.core.files import array_from_file
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.packed_batch import checked_batch
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_pictures,
)
from mmvision_export.models.sample_batches import PARITY_GRIDS, Grid, sample_batch

__all__ = [
    "MOST_PATCHES",
    "Sample",
    "sample_from_files",
    "sample_from_images",
    "samples_from_grids",
    "samples_from_images",
]

MOST_PATCHES = 8192
"""Of several images of one sample: attention in float64 is computed at once."""

_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """One packed batch.

    Attributes:
        name: What tables call it.
        pixel_values: `[num_patches, patch_dim]` float32.
        grid_thw: `[num_images, 3]` int64.
        files: Where it came from, if from files.
        pictures: The image behind each row of the grid, as the encoder sees it; empty if they are
            not known.
    """

    name: str
    pixel_values: npt.NDArray[np.float32]
    grid_thw: npt.NDArray[np.int64]
    files: tuple[str, ...] = ()
    pictures: tuple[Image.Image, ...] = ()

    @property
    def num_patches(self) -> int:
        """Patches, all images together."""
        return len(self.pixel_values)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the patches and the grid."""
        digest = hashlib.sha256()
        for array in (self.grid_thw, self.pixel_values):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """The name, with the names of a few files."""
        if not self.files:
            return self.name
        more = len(self.files) - _NAMED
        named = ", ".join(self.files[:_NAMED])
        return f"{self.name} ({named}{f' and {more} more' if more > 0 else ''})"


def samples_from_grids(
    config: EncoderConfig, grids: Mapping[str, Grid] = PARITY_GRIDS
) -> list[Sample]:
    """Seeded random pixels in each of the grids."""
    return [Sample(name, *sample_batch(grid, config, seed=0)) for name, grid in grids.items()]


def sample_from_images(
    paths: Sequence[Path], preprocessor: PreprocessorConfig, *, name: str = "images"
) -> Sample:
    """Image files as one packed batch.

    Raises:
        InputError: A file is missing, no image, or cannot be processed.
    """
    decoder = ImageDecoder(preprocessor, draft=False)
    return _sample(name, paths, [decoder.picture(path) for path in paths], preprocessor)


def samples_from_images(paths: Sequence[Path], preprocessor: PreprocessorConfig) -> list[Sample]:
    """Image files as packed batches, each of as many images as add up to `MOST_PATCHES`.

    Raises:
        InputError: See `sample_from_images`.
    """
    decoder = ImageDecoder(preprocessor, draft=False)
    groups: list[tuple[list[Path], list[Image.Image]]] = []
    patches = MOST_PATCHES + 1
    for path in paths:
        picture = decoder.picture(path)
        size = picture.width * picture.height // preprocessor.patch_size**2
        if patches + size > MOST_PATCHES:
            groups.append(([], []))
            patches = 0
        groups[-1][0].append(path)
        groups[-1][1].append(picture)
        patches += size
    return [
        _sample("images" if number == 1 else f"images {number}", *group, preprocessor)
        for number, group in enumerate(groups, 1)
    ]


def _sample(
    name: str,
    paths: Sequence[Path],
    pictures: Sequence[Image.Image],
    preprocessor: PreprocessorConfig,
) -> Sample:
    batch = batch_from_pictures(pictures, preprocessor)
    files = tuple(path.name for path in paths)
    return Sample(name, batch.pixel_values, batch.grid.rows, files, tuple(pictures))


def sample_from_files(pixel_values: Path, grid_thw: Path, config: EncoderConfig) -> Sample:
    """Patches `[num_patches, patch_dim]` and `grid_thw` from two .npy files.

    Raises:
        InputError: A file is missing or no .npy file, or what it holds breaks a rule of patches or
            grids.
    """
    array = array_from_file(pixel_values)
    own = np.float16 if array.dtype == np.float16 else np.float32
    batch = checked_batch(array, array_from_file(grid_thw), config, own)
    files = (pixel_values.name, grid_thw.name)
    return Sample("patches", batch.pixel_values.astype(np.float32), batch.grid.rows, files)
