"""The batches that comparisons run on.

Grids that have been trouble before, and patches to fill them with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig

__all__ = ["CHECK_GRIDS", "PARITY_GRIDS", "batch_of_grid", "sample_batch"]

# Rows (t, block rows, block columns), counted in merge blocks, so that they suit any merge size.
Grid = tuple[tuple[int, int, int], ...]

PARITY_GRIDS: dict[str, Grid] = {
    "one image": ((1, 8, 8),),
    "mixed sizes": ((1, 4, 6), (1, 10, 3), (1, 1, 1), (1, 2, 7)),
    "video row": ((4, 4, 5),),
    "many tiny": ((1, 1, 1),) * 33,
    "large": ((1, 20, 20),),
}
"""Name -> rows: the default of `mmvision parity`."""

CHECK_GRIDS: dict[str, Grid] = {"two sizes": ((1, 3, 4), (2, 2, 2)), "one block": ((1, 1, 1),)}
"""A quick subset, for checks that are part of other work."""


def sample_batch(
    grid: Grid, config: EncoderConfig, *, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A packed batch of seeded random 8-bit pixels, normalised as photographs are.

    Returns:
        pixel_values `[num_patches, patch_dim]` float32, exact in float16 too; grid_thw
        `[num_images, 3]` int64.
    """
    merge = config.spatial_merge_size
    grid_thw = np.array([(t, h * merge, w * merge) for t, h, w in grid], dtype=np.int64)
    preprocessor = PreprocessorConfig.for_encoder(config)
    num_patches = PackedGrid(grid_thw, config.patches_per_token).num_patches
    levels = np.random.default_rng(seed).integers(0, 256, (num_patches, config.patch_dim))
    pixels = (levels / 255 - np.mean(preprocessor.image_mean)) / np.mean(preprocessor.image_std)
    # Rounded to float16, so that every precision is given the same input.
    return pixels.astype(np.float16).astype(np.float32), grid_thw


def batch_of_grid(
    grid: Sequence[Sequence[int]], *, patch_dim: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A packed batch of seeded normal random patches for rows (t, h, w) counted in patches.

    Returns:
        pixel_values `[num_patches, patch_dim]` float32; grid_thw `[num_images, 3]` int64.
    """
    grid_thw = np.array(grid, dtype=np.int64)
    num_patches = int(grid_thw.prod(axis=1).sum())
    patches = np.random.default_rng(seed).standard_normal((num_patches, patch_dim), np.float32)
    return patches, grid_thw
