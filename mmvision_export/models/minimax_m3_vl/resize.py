"""The size an image is resized to, by each of the rules that servers of this model follow.

They give different numbers of tokens for one photograph: 3000 x 2000 pixels become 812 x 532 by
`area`, 2016 x 1344 by `long-side` and 672 x 448 by `box`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from mmvision_export.core.errors import InputError

__all__ = [
    "DEFAULT_LONG_SIDE",
    "LONG_SIDES",
    "MAX_PIXELS",
    "RESIZE_RULES",
    "ResizeRule",
    "size_by_area",
    "size_by_long_side",
    "size_in_box",
]

ResizeRule = Literal["area", "long-side", "box"]
RESIZE_RULES: tuple[ResizeRule, ...] = get_args(ResizeRule)

DEFAULT_LONG_SIDE = 2016
"""Of MiniMax's format check, for a request without `max_long_side_pixel`; in pixels."""

LONG_SIDES = (112, 3584)
"""Least and most `max_long_side_pixel`."""

MAX_PIXELS = 3584 * 3584
"""Of one image: 65,536 patches of 14 x 14."""

_MIN_SHORT_SIDE = 112
_MAX_ASPECT_RATIO = 200


def size_by_area(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Near its own size, with the area within bounds: transformers' rule.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Both sides become multiples of it.
        min_pixels: Smallest area.
        max_pixels: Largest area.

    Returns:
        Height and width in pixels.

    Raises:
        InputError: The aspect ratio is over 200.

    References:
        `smart_resize` of Qwen2-VL's processor, which this model's processor shares.
    """
    _refuse_extreme(height, width)
    # Python's round is to even at a half, as the processor's is.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def size_by_long_side(
    height: int, width: int, *, factor: int, max_long_side: int
) -> tuple[int, int]:
    """The long side at most so long, a short side under 112 enlarged: MiniMax's and SGLang's rule.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Both sides become multiples of it.
        max_long_side: In pixels. It wins over the short side's floor.

    Returns:
        Height and width in pixels.

    Raises:
        InputError: The aspect ratio is over 200.

    References:
        SGLang 0.5.23, `multimodal/processors/minimax_m3_vl.py`.
    """
    _refuse_extreme(height, width)
    long, short = max(height, width), min(height, width)
    most = max_long_side - max_long_side % factor
    scale = 1.0
    if long > most:
        scale = most / long
    elif short < _MIN_SHORT_SIDE:
        scale = min(_MIN_SHORT_SIDE / short, most / long)
    new_height, new_width = (
        max(factor, round(side * scale / factor) * factor) for side in (height, width)
    )
    return new_height, new_width


def size_in_box(
    height: int, width: int, *, factor: int, max_size: tuple[int, int]
) -> tuple[int, int]:
    """Sides rounded up, then both shrunk into a box: the rule of MiniMax-M3.1.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Both sides become multiples of it.
        max_size: Height and width of the box, in pixels.

    Returns:
        Height and width in pixels.

    References:
        SGLang 0.5.23, `multimodal/processors/minimax_m31_media.py`.
    """
    height, width = _rounded_up(height, factor), _rounded_up(width, factor)
    most_height, most_width = max_size
    if height > most_height or width > most_width:
        # In integers, as SGLang does it: the side that binds keeps its bound exactly.
        by_height = (most_height, width * most_height // height)
        by_width = (height * most_width // width, most_width)
        new_height, new_width = map(min, by_height, by_width)
        height = _rounded_up(max(new_height, factor), factor)
        width = _rounded_up(max(new_width, factor), factor)
    return height, width


def _rounded_up(side: int, factor: int) -> int:
    return -(-side // factor) * factor


def _refuse_extreme(height: int, width: int) -> None:
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"aspect ratio must be at most {_MAX_ASPECT_RATIO}, got {width} x {height} pixels"
        )
