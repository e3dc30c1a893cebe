"""What graphs are compared on: real images, patches from a file, or batches of sample grids."""

from __future__ import annotations

import dataclasses
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

__all__ = ["Sample", "sample_from_files", "sample_from_images", "samples_from_grids"]


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


def samples_from_grids(
    config: EncoderConfig, grids: Mapping[str, Grid] = PARITY_GRIDS
) -> list[Sample]:
    """Seeded random pixels in each of the grids."""
    return [Sample(name, *sample_batch(grid, config, seed=0)) for name, grid in grids.items()]


def sample_from_images(paths: Sequence[Path], preprocessor: PreprocessorConfig) -> Sample:
    """Image files as one packed batch.

    Raises:
        InputError: A file is missing, no image, or cannot be processed.
    """
    decoder = ImageDecoder(preprocessor, draft=False)
    pictures = tuple(decoder.picture(path) for path in paths)
    batch = batch_from_pictures(pictures, preprocessor)
    return Sample(
        "images",
        batch.pixel_values,
        batch.grid.rows,
        tuple(path.name for path in paths),
        pictures,
    )


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
