"""Validation of `grid_thw` and `pixel_values`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.runtime.grid import (
    checked_grid,
    checked_pixel_values,
    groups_of_images,
    tokens_per_image,
)
from tests.support.configs import grids
from tests.support.errors import refused

CONFIG = EncoderConfig()


@given(grids())
def test_valid_grids_pass_unchanged(grid: list[tuple[int, int, int]]) -> None:
    rows = np.array(grid, dtype=np.int32)
    checked = checked_grid(rows, CONFIG, num_patches=int(rows.prod(axis=1).sum()))
    assert checked.dtype == np.int64
    np.testing.assert_array_equal(checked, rows)
    assert tokens_per_image(checked, CONFIG).sum() * 4 == rows.prod(axis=1).sum()


@given(grids(max_images=20))
def test_groups_keep_every_image_whole_and_in_order(grid: list[tuple[int, int, int]]) -> None:
    rows = np.array(grid, dtype=np.int64)
    groups = groups_of_images(rows, 64)
    np.testing.assert_array_equal(np.concatenate([rows[group] for group in groups]), rows)
    sizes = [int(rows[group].prod(axis=1).sum()) for group in groups]
    for group, size in zip(groups, sizes, strict=True):
        assert size <= 64 or group.stop - group.start == 1
    # None that could have joined the one before it stands alone.
    first = [int(rows[group.start].prod()) for group in groups]
    assert all(size + joining > 64 for size, joining in zip(sizes, first[1:], strict=False))


@pytest.mark.parametrize(
    ("grid", "patches", "message"),
    [
        (
            [[1, 4, 4], [1, 4, 4], [1, 7, 4]],
            None,
            "grid_thw row 2: h must be a multiple of 2, got 7",
        ),
        ([[1, 4, 5]], None, "grid_thw row 0: w must be a multiple of 2, got 5"),
        ([[1, 4, 0]], None, "grid_thw row 0: w must be positive, got 0"),
        ([[1, 4, 4], [-1, 4, 4]], None, "grid_thw row 1: t must be positive, got -1"),
        ([[5, 4, 4]], None, "grid_thw row 0: t must be at most 4, got 5"),
        ([[1, 4, 4]], 17, "adds up to 16 patches, but pixel_values has 17 rows"),
        ([[1, 65536, 65536]], None, "adds up to 4294967296 patches, the limit is 2147483647"),
        (np.zeros((0, 3), int), None, "at least one row"),
        ([1, 4, 4], None, r"must have shape [num_images, 3], got [3]"),
        ([[1, 4]], None, r"must have shape [num_images, 3], got [1, 2]"),
        ([[1.0, 4.0, 4.0]], None, "must be integers, got dtype float64"),
        ("nonsense", None, "must be integers"),
        ([[1, 4, 4], [1, 4]], None, "grid_thw is not an array"),
    ],
)
def test_bad_grids(grid: Any, patches: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_grid(grid, CONFIG, num_patches=patches)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 1175), np.float32), "must have shape [num_patches, 1176], got [4, 1175]"),
        (np.zeros(1176, np.float32), "got [1176]"),
        (np.zeros((4, 1176)), "must be float32, got float64"),
        (np.zeros((4, 1176), np.uint8), "got uint8"),
        (np.full((4, 1176), np.nan, np.float32), "row 0 holds values that are not finite"),
        (
            np.where(np.arange(4)[:, None] == 2, np.inf, np.zeros((4, 1176))).astype(np.float32),
            "row 2 holds values",
        ),
    ],
)
def test_bad_pixels(pixels: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_pixel_values(pixels, CONFIG, np.float32)
    assert message in str(caught.value)


def test_float32_is_converted_for_a_float16_graph_unless_it_overflows() -> None:
    pixels = np.ones((4, 1176), np.float32)
    assert checked_pixel_values(pixels, CONFIG, np.float16).dtype == np.float16
    pixels[3, 7] = 1e6
    with refused(InputError, "row 3", "float16"):
        checked_pixel_values(pixels, CONFIG, np.float16)


def test_opposite_infinities_do_not_cancel() -> None:
    pixels = np.zeros((4, 1176), np.float32)
    pixels[1, 0], pixels[2, 0] = np.inf, -np.inf
    with refused(InputError, "row 1"):
        checked_pixel_values(pixels, CONFIG, np.float32)
