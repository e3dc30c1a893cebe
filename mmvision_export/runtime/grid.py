"""`grid_thw`: what a packed batch holds, and the rules it must obey.

One row (t, h, w) per image, counted in patches: t temporal patches of h x w spatial ones. Rows stand in the order in
which their patches are packed. Every function here is cheap enough to run before each launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError
from mmvision_export.core.finite import finite_rows
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "batch_in_groups",
    "checked_grid",
    "checked_pixel_values",
    "groups_of_images",
    "tokens_per_image",
]


def checked_grid(
    grid_thw: Any, config: EncoderConfig, num_patches: int | None = None
) -> npt.NDArray[np.int64]:
    """Validate `grid_thw` and return it as int64.

    Args:
        grid_thw: `[num_images, 3]`, any integer dtype.
        config: Gives the merge size that h and w must be multiples of.
        num_patches: Rows of `pixel_values`, when known; the grid must add up to it.

    Returns:
        `[num_images, 3]` int64, C-contiguous.

    Raises:
        InputError: Wrong rank, width or dtype; no rows; a value that is zero or negative; h or w that is not a multiple
            of the merge size; t beyond the model's temporal segment; a sum that is not `num_patches`.
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
            f"grid_thw row {row}: {'hw'[column]} must be a multiple of {merge}, got {grid[row, column + 1]}"
        )
    if (grid[:, 0] > config.segment_max_frames).any():
        row = int(np.argmax(grid[:, 0] > config.segment_max_frames))
        raise InputError(
            f"grid_thw row {row}: t must be at most {config.segment_max_frames}, got {grid[row, 0]}",
            hint=f"split the video into rows of at most {config.segment_max_frames} temporal patches; the patches "
            "stay as they are",
        )
    # Beyond int32 the graph's own arithmetic on token indices would wrap; float64 sums show it without wrapping here.
    total = float(grid.astype(np.float64).prod(axis=1).sum())
    if total >= 2**31:
        raise InputError(f"grid_thw adds up to {total:.0f} patches, the limit is {2**31 - 1}")
    if num_patches is not None and int(total) != num_patches:
        raise InputError(
            f"grid_thw adds up to {int(total)} patches, but pixel_values has {num_patches} rows"
        )
    return np.ascontiguousarray(grid, dtype=np.int64)


def checked_pixel_values(
    pixel_values: Any, config: EncoderConfig, dtype: npt.DTypeLike
) -> npt.NDArray[np.floating]:
    """Validate `pixel_values` and return it in the graph's dtype.

    float32 is converted to float16 when that is what the graph takes, since this is what a processor's output needs and
    loses nothing that the graph would keep; any other mismatch is refused.

    Args:
        pixel_values: `[num_patches, patch_dim]` float32, or `dtype`.
        config: Gives patch_dim.
        dtype: The graph's float type.

    Returns:
        `[num_patches, patch_dim]` in `dtype`, C-contiguous.

    Raises:
        InputError: Wrong rank, width or dtype, or values that are not finite.
    """
    patches = _array("pixel_values", pixel_values)
    wanted = np.dtype(dtype)
    accepted = dict.fromkeys((np.dtype(np.float32), wanted))
    if patches.dtype not in accepted:
        raise InputError(
            f"pixel_values must be {' or '.join(map(str, accepted))}, got {patches.dtype}"
        )
    if patches.ndim != 2 or patches.shape[1] != config.patch_dim:
        raise InputError(
            f"pixel_values must have shape [num_patches, {config.patch_dim}], got {list(patches.shape)}"
        )
    with np.errstate(over="ignore"):
        patches = np.ascontiguousarray(patches, dtype=wanted)
    finite = finite_rows(patches)
    if not finite.all():
        raise InputError(
            f"pixel_values row {int(np.argmin(finite))} holds values that are not finite in {wanted}"
        )
    return patches


def groups_of_images(grid_thw: npt.NDArray[np.int64], max_patches: int) -> list[slice]:
    """Cut a valid grid into runs of consecutive rows of at most `max_patches` patches; a larger image is one alone."""
    groups: list[slice] = []
    start, patches = 0, 0
    for row, count in enumerate(grid_thw.prod(axis=1).tolist()):
        if row > start and patches + count > max_patches:
            groups.append(slice(start, row))
            start, patches = row, 0
        patches += count
    return [*groups, slice(start, len(grid_thw))]


def batch_in_groups(
    pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64], max_patches: int
) -> list[tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]]:
    """A valid batch cut as by `groups_of_images`: patches and rows of each group, which are views."""
    bounds = np.cumsum([0, *grid_thw.prod(axis=1)])
    groups = groups_of_images(grid_thw, max_patches)
    return [(pixel_values[bounds[g.start] : bounds[g.stop]], grid_thw[g]) for g in groups]


def _array(name: str, values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different length
        raise InputError(f"{name} is not an array: {error}") from error


def tokens_per_image(
    grid_thw: npt.NDArray[np.int64], config: EncoderConfig
) -> npt.NDArray[np.int64]:
    """Image tokens that each row of a valid grid becomes: `t * h * w / merge**2`, `[num_images]` int64."""
    counts: npt.NDArray[np.int64] = grid_thw.prod(axis=1) // config.patches_per_token
    return counts
