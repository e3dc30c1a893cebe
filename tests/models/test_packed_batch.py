"""Packed batches: what is refused, and what follows from a grid."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.packed_batch import (
    PackedBatch,
    checked_batch,
    checked_grid,
)
from tests.support.configs import grids
from tests.support.errors import refused

CONFIG = EncoderConfig()
GRID = [(1, 2, 2)]


@given(grids())
def test_valid_grids_pass_unchanged(grid: list[tuple[int, int, int]]) -> None:
    rows = np.array(grid, dtype=np.int32)
    checked = checked_grid(rows, CONFIG, num_patches=int(rows.prod(axis=1).sum()))
    assert checked.rows.dtype == np.int64
    np.testing.assert_array_equal(checked.rows, rows)
    assert checked.tuples() == grid


@given(grids())
def test_what_follows_from_a_grid(grid: list[tuple[int, int, int]]) -> None:
    rows = np.array(grid)
    checked = checked_grid(rows, CONFIG)
    # One place of its own for every patch and every token, by a plain count.
    owners = [image for image, (t, h, w) in enumerate(grid) for _ in range(t * h * w)]
    assert checked.patches_per_image == [owners.count(image) for image in range(len(grid))]
    assert checked.num_patches == len(owners)
    assert checked.num_tokens * 4 == len(owners)
    for image, pieces in enumerate(checked.split(np.array(owners)[::4])):
        assert (pieces == image).all()
        assert len(pieces) == checked.tokens_per_image[image]
    for first, last in itertools.combinations(range(len(grid) + 1), 2):
        part = PackedBatch(np.array(owners), checked).images(slice(first, last))
        assert part.grid.tuples() == grid[first:last]
        assert set(part.pixel_values.tolist()) == set(range(first, last))


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
        (np.zeros((4, 1176)), "must be float32 or float16, got float64"),
        (np.zeros((4, 1176), np.uint8), "got uint8"),
        (
            np.full((4, 1176), np.nan, np.float32),
            "row 0, of image 0, holds values that are not finite",
        ),
        (
            np.where(np.arange(4)[:, None] == 2, np.inf, np.zeros((4, 1176))).astype(np.float32),
            "row 2, of image 0, holds values",
        ),
    ],
)
def test_bad_pixels(pixels: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_batch(pixels, GRID, CONFIG, np.float32)
    assert message in str(caught.value)


def test_float32_is_converted_for_a_float16_graph_unless_it_overflows() -> None:
    pixels = np.ones((4, 1176), np.float32)
    assert checked_batch(pixels, GRID, CONFIG, np.float16).pixel_values.dtype == np.float16
    pixels[3, 7] = 1e6
    with refused(InputError, "pixel_values", 3, "float16"):
        checked_batch(pixels, GRID, CONFIG, np.float16)


def test_opposite_infinities_do_not_cancel() -> None:
    pixels = np.zeros((4, 1176), np.float32)
    pixels[1, 0], pixels[2, 0] = np.inf, -np.inf
    with refused(InputError, "pixel_values", 1):
        checked_batch(pixels, GRID, CONFIG, np.float32)


def test_a_batch_of_another_type_is_converted_once_and_checked() -> None:
    batch = checked_batch(np.ones((4, 1176), np.float32), GRID, CONFIG, np.float32)
    assert batch.of_type(np.float32) is batch
    assert batch.of_type(np.float16).pixel_values.dtype == np.float16
    batch.pixel_values[1] = 1e6
    with refused(InputError, "pixel_values", 1, "float16"):
        batch.of_type(np.float16)
