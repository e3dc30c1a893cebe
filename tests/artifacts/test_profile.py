"""Optimization profiles: valid where they are made, and for an encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mmvision_export.artifacts.profile import (
    DEFAULT_PROFILE,
    DEFAULT_SLOTS,
    Profile,
    checked_profile,
    profiles_from_buckets,
    profiles_from_slots,
)
from mmvision_export.core.errors import EngineError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from tests.support.configs import HEAD_DIM_80
from tests.support.errors import refused

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


@pytest.mark.parametrize(
    ("changes", "names", "value"),
    [
        ({"min_patches": 0}, ["min_patches"], "0"),
        ({"min_patches": "4"}, ["min_patches"], "'4'"),
        ({"min_images": True}, ["min_images"], "True"),
        ({"max_images": 0}, ["max_images"], "0"),
        ({"opt_patches": 512}, ["min_patches", "opt_patches", "max_patches"], "[4, 512, 256]"),
        ({"min_images": 9}, ["min_images", "max_images"], "[9, 8]"),
    ],
)
def test_what_no_profile_is(changes: dict[str, Any], names: list[str], value: str) -> None:
    with pytest.raises(EngineError) as caught:
        dataclasses.replace(PROFILE, **changes)
    assert all(fact in str(caught.value) for fact in (*names, value))


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"min_patches": 3}, "min_patches", "3"),
        ({"opt_patches": 65}, "opt_patches", "65"),
        ({"max_patches": 257}, "max_patches", "257"),
        ({"max_images": 65}, "max_images", "65"),
    ],
)
def test_what_does_not_fit_the_encoder(changes: dict[str, int], name: str, value: str) -> None:
    profile = dataclasses.replace(PROFILE, **changes)
    with pytest.raises(EngineError) as caught:
        checked_profile(profile, HEAD_DIM_80)
    assert name in str(caught.value)
    assert value in str(caught.value)


def test_what_fits_is_given_back() -> None:
    largest = dataclasses.replace(PROFILE, min_patches=256, opt_patches=256, max_images=64)
    for profile in (PROFILE, largest, *profiles_from_buckets([4, 256], [64], HEAD_DIM_80)):
        assert checked_profile(profile, HEAD_DIM_80) is profile


@pytest.mark.parametrize("rows", [1, 2])
def test_slots_are_buckets_by_size(rows: int) -> None:
    pairs = [(8, 1024), (1, 1024), (16, 256), (1, 4)]
    profiles = profiles_from_slots(pairs, rows, HEAD_DIM_80)
    assert [(p.slots, p.max_patches) for p in profiles] == [
        (1, 4),
        (1, 1024),
        (16, 4096),
        (8, 8192),
    ]
    for profile in profiles:
        assert profile.is_bucket
        assert profile.rows_per_slot == rows
        assert profile.max_images == rows * (profile.slots or 0)
        assert checked_profile(profile, HEAD_DIM_80) is profile


@pytest.mark.parametrize(
    ("pairs", "rows", "facts"),
    [
        ([], 2, ["none"]),
        ([(1, 64), (0, 64)], 2, ["1x64, 0x64"]),
        ([(1, 64), (2, 64), (1, 64)], 2, ["1x64, 2x64, 1x64"]),
        ([(1, 66)], 2, [4, 66]),
        ([(1, 0)], 1, [4, 0]),
        ([(1, 64)], 3, ["rows_per_slot", 3]),
    ],
)
def test_what_no_slots_are(pairs: list[tuple[int, int]], rows: int, facts: list[object]) -> None:
    with refused(EngineError, *facts):
        profiles_from_slots(pairs, rows, HEAD_DIM_80)


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 2},
        {"slots": 3, "min_patches": 256, "opt_patches": 256, "min_images": 8},
        {"slots": 16, "min_patches": 256, "opt_patches": 256, "min_images": 8},
    ],
    ids=["no bucket", "of patches", "of rows"],
)
def test_slots_divide_a_bucket(changes: dict[str, int]) -> None:
    with refused(EngineError, "slots", changes["slots"], 256, 8):
        dataclasses.replace(PROFILE, **changes)


def test_slots_are_whole_merge_blocks() -> None:
    (bucket,) = profiles_from_buckets([24], [3], HEAD_DIM_80)
    with refused(EngineError, 4, 6):
        checked_profile(dataclasses.replace(bucket, slots=4), HEAD_DIM_80)


def test_the_default_slots_need_no_more_than_the_default_profile() -> None:
    for profile in profiles_from_slots(DEFAULT_SLOTS, 2, EncoderConfig()):
        assert profile.max_patches <= DEFAULT_PROFILE.max_patches
