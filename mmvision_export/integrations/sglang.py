"""Features for SGLang's multimodal items. For SGLang 0.5.23.

`sglang_models` has the model class that SGLang loads; this is what it calls, and needs no SGLang.

References:
    sglang/srt/models/minimax_vl_common.py: `get_image_feature`, `get_video_feature`,
    `_apply_max_frames_limit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmvision_export.core.errors import InputError
from mmvision_export.integrations.image_embedder import ImageEmbedder

if TYPE_CHECKING:
    import torch

__all__ = ["features_of_items", "segments_of_rows"]


def features_of_items(
    embedder: ImageEmbedder,
    items: Sequence[Any],
    grid: Literal["image_grid_thw", "video_grid_thw"],
) -> torch.Tensor:
    """What a language model takes for the items, one after the other. Imports torch.

    Args:
        embedder: The encoder.
        items: SGLang's `MultimodalDataItem`: each has `feature`, patches `[n, patch_dim]`, and the
            grid, integers `[rows, 3]`.
        grid: Name of the grid.

    Returns:
        `[image tokens, text_hidden_size]` bfloat16 on the CPU.

    Raises:
        InputError: There are no items, or see `ImageEmbedder.encode_patches`.
    """
    import torch

    if not items:
        raise InputError("no items were given", reason="missing")
    patches = torch.cat([item.feature for item in items]).float().cpu().numpy()
    rows = [tuple(row) for item in items for row in getattr(item, grid).tolist()]
    segments = segments_of_rows(rows, embedder.encoder.config.segment_max_frames)
    embeds = embedder.encode_patches(patches, np.array(segments))
    return torch.cat([each.tensor() for each in embeds])


def segments_of_rows(
    rows: Sequence[tuple[int, int, int]], most_frames: int
) -> list[tuple[int, int, int]]:
    """Grid rows with at most so many temporal patches; the patches stay as they are.

    SGLang's own encoder cuts videos at the same places before attention.
    """
    return [
        (min(most_frames, t - first), h, w)
        for t, h, w in rows
        for first in range(0, t, most_frames)
    ]
