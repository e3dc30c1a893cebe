"""Optimization profiles: valid where they are made, and for an encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mmvision_export.artifacts.profile import Profile, checked_profile, profiles_from_buckets
from mmvision_export.core.errors import EngineError
from tests.support.configs import HEAD_DIM_80

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
