"""The sizes of an engine where none, or some, are given."""

from __future__ import annotations

from typing import Any

import pytest

from mmvision_export.artifacts.profile import DEFAULT_PROFILE, DEFAULT_SLOTS, Profile
from mmvision_export.cli.engine_sizes import EngineSizes
from mmvision_export.engine.choices import AttentionWay
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.preprocessor_config import PreprocessorConfig, resized


def profiles(attention: AttentionWay, largest_image: int, **given: Any) -> list[Profile]:
    options = dict.fromkeys(("buckets", "min_patches", "opt_patches", "max_patches", "max_images"))
    sizes = EngineSizes(**{**options, **given})
    return sizes.profiles(attention, EncoderConfig(), largest_image=largest_image)


def test_the_released_preprocessing_needs_no_more_than_the_default() -> None:
    assert profiles("native", PreprocessorConfig().most_patches) == [DEFAULT_PROFILE]


@pytest.mark.parametrize("long_side", [2016, 3584])
def test_room_for_the_largest_image_of_the_preprocessing(long_side: int) -> None:
    largest = PreprocessorConfig().by("long-side", max_long_side=long_side).most_patches
    assert largest == (long_side // 14) ** 2
    (native,) = profiles("native", largest)
    assert native.max_patches == largest
    assert native.opt_patches == DEFAULT_PROFILE.opt_patches
    slots = profiles("uniform", largest)
    assert max(profile.image_patches for profile in slots) == largest
    assert len(slots) == len(DEFAULT_SLOTS) + 2
    photograph = PreprocessorConfig().by("long-side", max_long_side=long_side)
    height, width = resized(2000, 3000, photograph)
    if long_side == 2016:
        assert (height // 14) * (width // 14) in [profile.image_patches for profile in slots]
    # What is given stands.
    assert profiles("native", largest, max_patches=256, max_images="8")[0].max_patches == 256
    assert [p.max_patches for p in profiles("uniform", largest, buckets="2x64")] == [128]


def test_auto_has_slots_to_take_where_no_size_was_given() -> None:
    names = ("buckets", "min_patches", "opt_patches", "max_patches", "max_images")
    options: dict[str, Any] = dict.fromkeys(names)
    config = EncoderConfig()
    nothing = EngineSizes(**options)
    assert nothing.slots("auto", config, largest_image=4) == profiles("uniform", 4)
    assert nothing.slots("native", config, largest_image=4) == []
    for given in ({"buckets": "1024"}, {"max_patches": 256}, {"max_images": "8"}):
        assert EngineSizes(**{**options, **given}).slots("auto", config, largest_image=4) == []


def test_numbers_of_images() -> None:
    few_and_many = profiles("native", 4, buckets="1024")
    assert [profile.max_images for profile in few_and_many] == [9, 65]
    assert [p.max_images for p in profiles("native", 4, buckets="1024", max_images="3")] == [4]
    assert profiles("native", 4, max_images="3")[0].max_images == 3
