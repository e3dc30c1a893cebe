"""Token geometry from `grid_thw`, by elementwise operations, which export.

No loop over images, no value read on the host: the number of patches and of images stays dynamic,
and a graph traced with two images is the graph for any number of them. All arithmetic is int32 on
non-negative numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["cu_seqlens_from_grid", "inverse_frequencies", "positions_from_grid"]


def inverse_frequencies(config: EncoderConfig) -> Tensor:
    """Rotary frequencies of one axis, `theta ** -(2i / axis_dim)`.

    `[axis_dim/2]` float32, radians per patch.

    Rounded to float32 once, from float64.
    """
    exponents = torch.arange(0, config.axis_dim, 2, dtype=torch.float64) / config.axis_dim
    return (1.0 / config.rope_theta**exponents).to(torch.float32)


def cu_seqlens_from_grid(grid_thw: Tensor) -> Tensor:
    """First patch of each image and the end of the last one.

    Args:
        grid_thw: `[num_images, 3]` int32.

    Returns:
        `[num_images + 1]` int32, ascending from 0 to num_patches.
    """
    lengths = grid_thw[:, 0] * grid_thw[:, 1] * grid_thw[:, 2]
    return F.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def positions_from_grid(
    grid_thw: Tensor, cu_seqlens: Tensor, num_patches: int, merge: int
) -> Tensor:
    """Position (frame, row, column) of every patch of the packed sequence, in merge-block order.

    Args:
        grid_thw: `[num_images, 3]` int32.
        cu_seqlens: `[num_images + 1]` int32, from `cu_seqlens_from_grid`.
        num_patches: Length N of the packed sequence.
        merge: Side of a merge block, in patches.

    Returns:
        `[N, 3]` int32.
    """
    index = torch.arange(num_patches, dtype=torch.int32, device=grid_thw.device)
    # Image of each patch = how many images end at or before it: [N, num_images] -> [N].
    image = (index[:, None] >= cu_seqlens[None, 1:]).sum(dim=1, dtype=torch.int32)
    grid = grid_thw.index_select(0, image)  # [N, 3]
    h, w = grid[:, 1], grid[:, 2]

    within_image = index - cu_seqlens.index_select(0, image)
    frame, within_frame = within_image // (h * w), within_image % (h * w)
    block, within_block = within_frame // (merge * merge), within_frame % (merge * merge)
    blocks_per_row = w // merge
    row = block // blocks_per_row * merge + within_block // merge
    column = block % blocks_per_row * merge + within_block % merge
    return torch.stack([frame, row, column], dim=1)
