"""Programs of the attention kernel's grid that have no tile: what they load before they return.

A bucket of an engine has a segment for each image it may take, and for each a program per head and
layer. Loads are counted in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention import attention_by_kernel, cu, exact_attention, qkv
from tests.support.configs import relative_l2
from tests.support.programs import ProgramLoads, counted_loads, num_tiles, predicted_loads

pytest.importorskip("triton", reason="triton is not installed")

HEAD_DIM = 16
BLOCK_M = 16


def launched(
    lengths: list[int], told_patches: int | None = None
) -> tuple[float, dict[int, ProgramLoads]]:
    """Error of the kernel's result, NaN if an element was not written, and its programs' loads."""
    q, k, v = qkv(sum(lengths), 1, HEAD_DIM, torch.float16)
    bounds = cu(lengths)
    with counted_loads() as loads:
        out = attention_by_kernel(q, k, v, bounds, BLOCK_M, 32, told_patches)
    return relative_l2(out.double(), exact_attention(q, k, v, bounds, HEAD_DIM**-0.5)), loads


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    empty=st.integers(0, 20),
)
def test_programs_of_trailing_empty_segments_return_after_one_load(
    lengths: list[int], empty: int
) -> None:
    while lengths[-1] == 0:
        empty, lengths = empty + 1, lengths[:-1]
    error, loads = launched([*lengths, *[0] * empty])
    assert error < 2e-3
    # Exactly the tiles there are, each by one program.
    assert sum(program.tiles > 0 for program in loads.values()) == num_tiles(lengths, BLOCK_M)
    # Every program loads at least once, so that all of the grid is counted.
    first_empty = sum(lengths) // BLOCK_M + len(lengths)
    assert sorted(loads) == list(range(first_empty + empty))
    for program in range(first_empty, first_empty + empty):
        assert loads[program] == ProgramLoads(bounds=1, tiles=0)
    predicted = predicted_loads([*lengths, *[0] * empty], BLOCK_M)
    assert [loads[program].bounds for program in sorted(loads)] == predicted


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any))
def test_the_search_is_as_long_as_the_patches_or_the_segments_allow(lengths: list[int]) -> None:
    candidates = min(len(lengths), sum(lengths) // BLOCK_M + 1)
    limit = 3 + (candidates - 1).bit_length()
    assert max(predicted_loads(lengths, BLOCK_M)) <= limit


def test_a_kernel_that_is_not_told_where_patches_end_searches() -> None:
    """The control of the counts: told of more patches than there are, no program sees the end."""
    lengths = [20, 7, *[0] * 63]
    known, unknown = launched(lengths), launched(lengths, told_patches=10_000)
    assert known[0] == unknown[0] < 2e-3  # the result is the same
    first_empty = sum(lengths) // BLOCK_M + 2
    trailing = range(first_empty, first_empty + 63)
    assert {known[1][program].bounds for program in trailing} == {1}
    assert min(unknown[1][program].bounds for program in trailing) >= 4
    assert max(unknown[1][program].bounds for program in trailing) >= 8
    assert not any(unknown[1][program].tiles for program in trailing)


def test_a_kernel_that_is_told_of_too_few_patches_loses_some() -> None:
    """The control of the results: programs do return for what they are told."""
    assert launched([16, 16])[0] < 2e-3
    assert not launched([16, 16], told_patches=16)[0] < 2e-3


@pytest.mark.parametrize("bucket", [256, 1024, 4096, 16384])
def test_predicted_cost_of_a_bucket_with_one_image(bucket: int) -> None:
    """Of 65 segments, one is the image's and one the padding's."""
    block_m, empty = 128, min(65, bucket // 4) - 2
    lengths = [bucket - 100, 100, *[0] * empty]
    loads = predicted_loads(lengths, block_m)
    idle = len(loads) - num_tiles(lengths, block_m)
    assert empty <= idle <= empty + 2
    assert loads[-empty:] == [1] * empty
    assert max(loads) <= 3 + 6
