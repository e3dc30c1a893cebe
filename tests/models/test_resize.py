"""The sizes of the three rules: those of the servers' own code, and what every size must be."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    patches_from_image,
    resized,
)
from mmvision_export.models.minimax_m3_vl.resize import MAX_PIXELS, RESIZE_RULES, ResizeRule
from tests.support.errors import refused
from tests.support.images import photographs

AREA = PreprocessorConfig()
LONG_SIDE = AREA.by("long-side")
BOX = AREA.by("box")
TABLE = Path(__file__).with_name("resize_table.csv")


def config_of(bound: str) -> PreprocessorConfig:
    """The rule that a row of the table is of, by its bound: `area`, `2016` or `672x672`."""
    if bound == "area":
        return AREA
    if "x" not in bound:
        return AREA.by("long-side", max_long_side=int(bound))
    height, width = map(int, bound.split("x"))
    return dataclasses.replace(BOX, max_size=(height, width))


def rows_of(server: str) -> list[tuple[tuple[int, int], str, tuple[int, int]]]:
    """Size, bound and resized size of each image; `scripts/resize_table.py` wrote them."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["server"] == server]
    return [
        (
            (int(row["height"]), int(row["width"])),
            row["bound"],
            (int(row["new_height"]), int(row["new_width"])),
        )
        for row in rows
    ]


def test_2000_sizes_are_those_of_sglang() -> None:
    rows = rows_of("sglang")
    assert len(rows) == 2000
    others = 0
    for size, bound, expected in rows:
        assert resized(*size, config_of(bound)) == expected, (size, bound)
        others += resized(*size, AREA) != expected
    assert others > 1500  # the control: the default rule is another


def vllm_departs(size: tuple[int, int], bound: str) -> bool:
    """Where vLLM's size is neither transformers' nor SGLang's: thin strips.

    It rounds a side of at most 14 pixels up to a block, where transformers scales the strip; and
    it enlarges a short side under 112 without holding the long side's bound, which SGLang keeps.
    """
    if bound == "area":
        return min(size) <= 14
    return min(size) < 112 and max(size) * 112 > int(bound) * min(size)


def test_2000_sizes_are_those_of_vllm_but_for_thin_strips() -> None:
    rows = rows_of("vllm")
    assert len(rows) == 2000
    strips = departures = others = 0
    for size, bound, expected in rows:
        equal = resized(*size, config_of(bound)) == expected
        strips += vllm_departs(size, bound)
        departures += not equal
        assert equal or vllm_departs(size, bound), (size, bound, expected)
        others += resized(*size, BOX) != expected
    assert 100 < departures <= strips < 500
    assert others > 1500  # the control: another rule


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AREA, (532, 812)),
        (LONG_SIDE, (1344, 2016)),
        (AREA.by("long-side", max_long_side=3584), (1988, 2996)),
        (BOX, (448, 672)),
    ],
)
def test_a_large_photograph_by_each_rule(
    config: PreprocessorConfig, expected: tuple[int, int]
) -> None:
    assert resized(2000, 3000, config) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((50, 50), (112, 112)),  # the short side is enlarged
        ((10, 2000), (28, 2016)),  # the long side's cap wins
        ((112, 112), (112, 112)),
        ((2016, 2017), (2016, 2016)),
    ],
)
def test_long_sides_known_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized(*size, LONG_SIDE) == expected
    assert resized(*size[::-1], LONG_SIDE) == expected[::-1]


@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from(RESIZE_RULES),
    st.integers(4, 70_000),
)
def test_every_size_is_whole_blocks_and_fits(
    height: int, width: int, rule: ResizeRule, most_patches: int
) -> None:
    config = AREA.by(rule)
    if max(height, width) > 200 * min(height, width):
        return
    new_height, new_width = resized(height, width, config)
    assert (new_height % 28, new_width % 28) == (0, 0)
    assert 0 < new_height * new_width <= config.max_pixels <= MAX_PIXELS
    if rule == "long-side":
        assert max(new_height, new_width) <= 2016
    if rule == "box":
        assert new_height <= 672
        assert new_width <= 672
    # For an engine that takes so many patches; a strip of one block cannot be made smaller.
    if most_patches * 196 >= config.min_pixels:
        fitting = config.within(most_patches)
        new_height, new_width = resized(height, width, fitting)
        assert new_height * new_width <= fitting.max_pixels or min(new_height, new_width) == 28


def test_what_is_no_rule_and_no_long_side_is_refused() -> None:
    with refused(InputError, "aspect ratio", 200, "1 x 201"):
        resized(201, 1, LONG_SIDE)
    with refused(ConfigError, "area", 1008):
        AREA.by("area", max_long_side=1008)
    with refused(ConfigError, "max_long_side", 100):
        AREA.by("long-side", max_long_side=100)
    # From one rule to another and back there is nothing left of the first.
    assert LONG_SIDE.by("area") == AREA
    assert BOX.by("long-side") == LONG_SIDE


def test_patches_of_a_photograph_have_the_grid_of_the_rule() -> None:
    photograph = Image.fromarray(next(iter(photographs().values())))
    for config in (AREA, LONG_SIDE, BOX):
        height, width = resized(photograph.height, photograph.width, config)
        patches, grid = patches_from_image(photograph, config)
        assert grid == (1, height // 14, width // 14)
        assert len(patches) == grid[1] * grid[2]
