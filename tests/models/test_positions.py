"""The vectorised geometry against the reference's loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.minimax_m3_vl.positions import (
    cu_seqlens_from_grid,
    inverse_frequencies,
    positions_from_grid,
)
from tests.support.configs import HEAD_DIM_80, grids


def positions(grid: list[tuple[int, int, int]], merge: int) -> np.ndarray:
    rows = torch.tensor(grid, dtype=torch.int32)
    return positions_from_grid(
        rows, cu_seqlens_from_grid(rows), int(rows.prod(dim=1).sum()), merge
    ).numpy()


@given(merge=st.sampled_from([1, 2, 3]), data=st.data())
def test_positions_match_the_reference(merge: int, data: st.DataObject) -> None:
    grid = data.draw(grids(merge))
    expected = np.concatenate([reference.patch_positions(*row, merge) for row in grid])
    np.testing.assert_array_equal(positions(grid, merge), expected)


def test_the_comparison_can_fail() -> None:
    """Row-major order, the likely mistake, differs where an image is wider than a block."""
    row_major = np.array([(0, y, x) for y in range(4) for x in range(6)])
    assert (positions([(1, 4, 6)], 2) != row_major).any()


@given(grids())
def test_cu_seqlens_are_the_running_sum_of_patches(grid: list[tuple[int, int, int]]) -> None:
    cu_seqlens = cu_seqlens_from_grid(torch.tensor(grid, dtype=torch.int32))
    assert cu_seqlens.dtype == torch.int32
    np.testing.assert_array_equal(
        cu_seqlens.numpy(), np.cumsum([0, *(t * h * w for t, h, w in grid)])
    )


@pytest.mark.parametrize(
    "grid", [[(1, 2, 2)] * 1024, [(1, 512, 128)], [(1, 2, 2), (4, 254, 62), (1, 2, 2)]]
)
def test_large_grids(grid: list[tuple[int, int, int]]) -> None:
    expected = np.concatenate([reference.patch_positions(*row, 2) for row in grid])
    np.testing.assert_array_equal(positions(grid, 2), expected)


def test_inverse_frequencies_match_the_definition_in_float64() -> None:
    expected = 1 / 10000 ** (np.arange(0, 26, 2) / 26)
    np.testing.assert_allclose(inverse_frequencies(HEAD_DIM_80).numpy(), expected, rtol=2.0**-24)
