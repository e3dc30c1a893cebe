"""What an image becomes does not depend on the images beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import InputError, NotFiniteError
from tests.support.configs import HEAD_DIM_80, batch, grids, relative_l2

# OpenVINO's products add up in an order that depends on the number of images of a launch. float32
# has 24 bits, and 2 ** -24 times the square root of the 4,096 terms of its longest sum is 4e-6.
_TOLERANCES = {"onnxruntime-cpu": 0.0, "openvino": 4e-6}


@pytest.fixture(scope="module", params=_TOLERANCES)
def encoder(request: pytest.FixtureRequest, exported: Path) -> Iterator[VisionEncoder]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with VisionEncoder.open(exported, backend=request.param, threads=2) as opened:
        yield opened


Image = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Patches `[num_patches, patch_dim]`, and their row (t, h, w)."""


def images_of(grid: list[tuple[int, int, int]]) -> list[Image]:
    pixels, rows = batch(grid, HEAD_DIM_80)
    bounds = np.cumsum(rows.prod(axis=1))[:-1]
    return list(zip(np.split(pixels, bounds), rows, strict=True))


def embeds_of(encoder: VisionEncoder, images: list[Image]) -> list[npt.NDArray[np.float32]]:
    """Each image's, of one packed batch."""
    rows = np.stack([row for _, row in images])
    embeds = encoder(np.concatenate([patches for patches, _ in images]), rows)
    tokens = np.cumsum(rows.prod(axis=1))[:-1] // 4
    return np.split(embeds, tokens)


@settings(max_examples=15, deadline=None)
@given(grid=grids(), seed=st.integers(0, 1000))
def test_packed_and_permuted_equals_alone(
    encoder: VisionEncoder, grid: list[tuple[int, int, int]], seed: int
) -> None:
    images = images_of(grid)
    alone = [embeds_of(encoder, [image])[0] for image in images]
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    together = embeds_of(encoder, [images[index] for index in order])
    tolerance = _TOLERANCES[encoder.info["backend"]]
    for index, embeds in zip(order, together, strict=True):
        assert relative_l2(embeds, alone[index]) <= tolerance


def test_other_patches_are_other_embeddings(encoder: VisionEncoder) -> None:
    """The control: what is compared can differ."""
    together = embeds_of(encoder, images_of([(1, 4, 6), (1, 4, 6)]))
    assert relative_l2(*together) > 0.01


@settings(max_examples=8, deadline=None)
@given(grid=grids(), chosen=st.integers(0, 5), value=st.sampled_from([np.nan, np.inf, 3e38]))
def test_one_bad_image_is_named_and_reaches_no_other(
    encoder: VisionEncoder, grid: list[tuple[int, int, int]], chosen: int, value: float
) -> None:
    images = images_of(grid)
    bad = chosen % len(images)
    expected = embeds_of(encoder, images)
    images[bad] = (np.full_like(images[bad][0], value), images[bad][1])
    with pytest.raises((InputError, NotFiniteError), match=f"of image {bad}") as refusal:
        embeds_of(encoder, images)
    if isinstance(refusal.value, NotFiniteError):
        tolerance = _TOLERANCES[encoder.info["backend"]]
        for index, embeds in enumerate(refusal.value.image_embeds):
            assert (embeds is None) == (index == bad)
            assert embeds is None or relative_l2(embeds, expected[index]) <= tolerance
