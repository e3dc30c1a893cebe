"""A packed batch: the patches of images, one after the other, and the grid of each.

One row (t, h, w) of `grid_thw` per image, counted in patches: t temporal patches of h x w spatial
ones. Rows stand in the order in which their patches are packed. A batch is validated where it is
made, and what follows from its grid is worked out once, here.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError
from mmvision_export.core.finite import finite_rows
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["PackedBatch", "PackedGrid", "checked_batch", "checked_grid"]

# Beyond int32 the graph's own arithmetic on token indices would wrap.
_MOST_PATCHES = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class PackedGrid:
    """What a valid grid says.

    Attributes:
        rows: `[num_images, 3]` int64, C-contiguous.
        patches_per_token: Patches that one image token is made of.
    """

    rows: npt.NDArray[np.int64]
    patches_per_token: int

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    @functools.cached_property
    def patches_per_image(self) -> list[int]:
        """Patches of each image, t * h * w."""
        counts: list[int] = self.rows.prod(axis=1).tolist()
        return counts

    @functools.cached_property
    def bounds(self) -> list[int]:
        """The patches of image i are rows bounds[i] to bounds[i + 1]."""
        bounds: list[int] = np.cumsum([0, *self.patches_per_image]).tolist()
        return bounds

    @property
    def num_patches(self) -> int:
        """Patches, all images together."""
        return self.bounds[-1]

    @property
    def num_tokens(self) -> int:
        """Image tokens, all images together."""
        return self.num_patches // self.patches_per_token

    @property
    def tokens_per_image(self) -> list[int]:
        """Image tokens of each image."""
        return [count // self.patches_per_token for count in self.patches_per_image]

    def split(self, per_token: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """What has a row per image token, `[num_tokens, width]`, as one view per image."""
        return np.split(per_token, [bound // self.patches_per_token for bound in self.bounds[1:-1]])

    def tuples(self) -> list[tuple[int, int, int]]:
        """The rows as tuples."""
        return [(t, h, w) for t, h, w in self.rows.tolist()]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Patches with their grid.

    Attributes:
        pixel_values: `[num_patches, patch_dim]`: a C-contiguous float array of NumPy, or what
            stands for one in device memory.
        grid: Its images.
    """

    pixel_values: Any
    grid: PackedGrid

    @classmethod
    def of_images(
        cls,
        images: Sequence[tuple[npt.NDArray[np.float32], tuple[int, int, int]]],
        patches_per_token: int,
    ) -> PackedBatch:
        """One batch of the patches and grid rows of single images, made by this package."""
        patches = [patches for patches, _ in images]
        rows = np.array([row for _, row in images], dtype=np.int64)
        return cls(
            patches[0] if len(patches) == 1 else np.concatenate(patches),
            PackedGrid(rows, patches_per_token),
        )

    def images(self, which: slice) -> PackedBatch:
        """Consecutive images, as views."""
        first, last = self.grid.bounds[which.start], self.grid.bounds[which.stop]
        grid = PackedGrid(self.grid.rows[which], self.grid.patches_per_token)
        return PackedBatch(self.pixel_values[first:last], grid)

    def of_type(self, dtype: npt.DTypeLike) -> PackedBatch:
        """The same in a graph's float type.

        Raises:
            InputError: A value is not finite in that type.
        """
        if self.pixel_values.dtype == dtype:
            return self
        return PackedBatch(
            _finite_patches(self.pixel_values, self.grid, np.dtype(dtype)), self.grid
        )


def checked_batch(
    pixel_values: Any, grid_thw: Any, config: EncoderConfig, dtype: npt.DTypeLike
) -> PackedBatch:
    """Validate what a caller made.

    float32 is converted to float16 when that is what the graph takes: this is what a processor's
    output needs, and loses nothing that the graph would keep. float16 is converted to float32, which
    has each of its numbers. Any other mismatch is refused.

    Args:
        pixel_values: `[num_patches, patch_dim]` float32 or float16, finite.
        grid_thw: `[num_images, 3]`, any integer dtype; see `checked_grid`.
        config: The encoder's dimensions.
        dtype: The graph's float type.

    Raises:
        InputError: Wrong rank, width or dtype, or values that are not finite; see also
            `checked_grid`.
    """
    patches = _array("pixel_values", pixel_values)
    wanted = np.dtype(dtype)
    accepted = (np.dtype(np.float32), np.dtype(np.float16))
    if patches.dtype not in accepted:
        raise InputError(
            f"pixel_values must be {' or '.join(map(str, accepted))}, got {patches.dtype}"
        )
    if patches.ndim != 2 or patches.shape[1] != config.patch_dim:
        raise InputError(
            f"pixel_values must have shape [num_patches, {config.patch_dim}], "
            f"got {list(patches.shape)}"
        )
    grid = checked_grid(grid_thw, config, num_patches=len(patches))
    return PackedBatch(_finite_patches(patches, grid, wanted), grid)


def checked_grid(
    grid_thw: Any, config: EncoderConfig, num_patches: int | None = None
) -> PackedGrid:
    """Validate `grid_thw`.

    Args:
        grid_thw: `[num_images, 3]`, any integer dtype.
        config: Gives the merge size that h and w must be multiples of.
        num_patches: Rows of `pixel_values`, when known; the grid must add up to it.

    Raises:
        InputError: Wrong rank, width or dtype; no rows; a value that is zero or negative; h or w
            that is not a multiple of the merge size; t beyond the model's temporal segment; a sum
            that is not `num_patches`.
    """
    grid = _array("grid_thw", grid_thw)
    if not np.issubdtype(grid.dtype, np.integer):
        raise InputError(f"grid_thw must be integers, got dtype {grid.dtype}")
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise InputError(f"grid_thw must have shape [num_images, 3], got {list(grid.shape)}")
    if len(grid) == 0:
        raise InputError("grid_thw must have at least one row, got none")
    merge = config.spatial_merge_size
    if not (grid > 0).all():
        row, column = np.argwhere(grid <= 0)[0]
        raise InputError(
            f"grid_thw row {row}: {'thw'[column]} must be positive, got {grid[row, column]}"
        )
    if (grid[:, 1:] % merge).any():
        row, column = np.argwhere(grid[:, 1:] % merge)[0]
        raise InputError(
            f"grid_thw row {row}: {'hw'[column]} must be a multiple of {merge}, "
            f"got {grid[row, column + 1]}"
        )
    if (grid[:, 0] > config.segment_max_frames).any():
        row = int(np.argmax(grid[:, 0] > config.segment_max_frames))
        raise InputError(
            f"grid_thw row {row}: t must be at most {config.segment_max_frames}, got {grid[row, 0]}",
            hint=f"split the video into rows of at most {config.segment_max_frames} temporal patches; "
            "the patches stay as they are",
        )
    # float64 sums show what is beyond without wrapping here.
    total = float(grid.astype(np.float64).prod(axis=1).sum())
    if total > _MOST_PATCHES:
        raise InputError(f"grid_thw adds up to {total:.0f} patches, the limit is {_MOST_PATCHES}")
    if num_patches is not None and int(total) != num_patches:
        raise InputError(
            f"grid_thw adds up to {int(total)} patches, but pixel_values has {num_patches} rows"
        )
    return PackedGrid(np.ascontiguousarray(grid, dtype=np.int64), config.patches_per_token)


def _finite_patches(
    patches: npt.NDArray[np.floating], grid: PackedGrid, dtype: np.dtype[Any]
) -> npt.NDArray[np.floating]:
    with np.errstate(over="ignore"):
        patches = np.ascontiguousarray(patches, dtype=dtype)
    finite = finite_rows(patches)
    if not finite.all():
        row = int(np.argmin(finite))
        image = bisect.bisect_right(grid.bounds, row) - 1
        raise InputError(
            f"pixel_values row {row}, of image {image}, holds values that are not finite in {dtype}"
        )
    return patches


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different length
        raise InputError(f"{name} is not an array: {error}") from error
