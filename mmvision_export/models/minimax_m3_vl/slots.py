"""A packed batch laid out in slots of equal length, an image and its padding in each.

Slot s has patches `s * L` to `(s + 1) * L` and two rows of `grid_thw`: row 2s is the image, row 2s + 1 its
padding, patches of zeros. An image that fills its slot is followed by a row that counts no patches.
Such rows are a packed batch like any other, so that the same rows suit every form of attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["SlottedBatch", "slot_rows", "slots_from_batch"]


def slot_rows(
    grid_thw: npt.NDArray[np.int64], slot_patches: int, config: EncoderConfig
) -> npt.NDArray[np.int64]:
    """The grid of images in slots.

    Args:
        grid_thw: `[num_images, 3]`, a valid grid.
        slot_patches: Length L of a slot, whole merge blocks.
        config: Gives the size of a merge block.

    Returns:
        `[2 * num_images, 3]` int64.

    Raises:
        InputError: An image is longer than a slot, or a slot is not whole merge blocks.
    """
    merge, per_token = config.spatial_merge_size, config.patches_per_token
    padding = slot_patches - grid_thw.prod(axis=1)
    if slot_patches % per_token or padding.min() < 0:
        raise InputError(
            f"a slot must be a multiple of {per_token} patches and hold its image, got slots of "
            f"{slot_patches} for images of up to {slot_patches - int(padding.min())}"
        )
    rows = np.empty((len(grid_thw), 2, 3), np.int64)
    rows[:, 0] = grid_thw
    rows[:, 1] = (1, merge, 0)
    rows[:, 1, 2] = padding // merge
    rows[padding == 0, 1] = (0, merge, merge)
    return rows.reshape(-1, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class SlottedBatch:
    """Images in slots.

    Attributes:
        pixel_values: `[num_slots * L, patch_dim]`, in the dtype of the packed batch.
        grid_thw: `[2 * num_slots, 3]` int64.
        patches: `[num_patches]`: where each patch of the packed batch is.
        tokens: `[num_image_tokens]`: where each of its image tokens is.
    """

    pixel_values: npt.NDArray[np.floating]
    grid_thw: npt.NDArray[np.int64]
    patches: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    def packed(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What has a row per patch or per image token, in the order of the packed batch.

        Args:
            values: `[num_slots * L, ...]` or `[num_slots * L / patches_per_token, ...]`; an array
                of another length is given back as it is.
        """
        slotted = len(self.pixel_values)
        if len(values) == slotted:
            return values[self.patches]
        per_token = len(self.patches) // len(self.tokens)
        return values[self.tokens] if len(values) == slotted // per_token else values


def slots_from_batch(
    pixel_values: npt.NDArray[np.floating],
    grid_thw: npt.NDArray[np.int64],
    config: EncoderConfig,
    *,
    slot_patches: int | None = None,
) -> SlottedBatch:
    """Lay a packed batch out in slots, in its order.

    Args:
        pixel_values: `[num_patches, patch_dim]`.
        grid_thw: `[num_images, 3]`, a valid grid.
        config: The encoder's dimensions.
        slot_patches: Length of a slot; None for the largest image's.

    Raises:
        InputError: See `slot_rows`.
    """
    lengths = grid_thw.prod(axis=1)
    slot_patches = int(lengths.max()) if slot_patches is None else slot_patches
    rows = slot_rows(grid_thw, slot_patches, config)
    per_token = config.patches_per_token
    patches = _places(lengths, slot_patches)
    slotted = np.zeros(
        (len(lengths) * slot_patches, *pixel_values.shape[1:]), dtype=pixel_values.dtype
    )
    slotted[patches] = pixel_values
    tokens = _places(lengths // per_token, slot_patches // per_token)
    return SlottedBatch(slotted, rows, patches, tokens)


def _places(lengths: npt.NDArray[np.int64], slot_length: int) -> npt.NDArray[np.int64]:
    """Index in slots of each item that is packed."""
    starts = np.arange(len(lengths)) * slot_length - (np.cumsum(lengths) - lengths)
    places: npt.NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(starts, lengths)
    return places
