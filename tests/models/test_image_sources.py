"""Images as callers have them make the batch that Pillow's images make."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.image_sources import batch_from_sources
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig, batch_from_images
from tests.support.errors import refused

_CONFIG = PreprocessorConfig()
_LEVELS = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
_IMAGE = Image.fromarray(_LEVELS)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    _IMAGE.save(path)
    return path


def sources(photo: Path) -> dict[str, Any]:
    alpha = np.dstack([_LEVELS, np.full((90, 130), 255, np.uint8)])
    return {
        "one image": _IMAGE,
        "one path": photo,
        "one name": str(photo),
        "one array": _LEVELS,
        "not contiguous": np.asfortranarray(_LEVELS),
        "RGBA": alpha,
        "a tensor": torch.from_numpy(_LEVELS),
        "a list of one": [_LEVELS],
        "a batch": _LEVELS[None],
        "a generator": (each for each in [photo]),
    }


@pytest.mark.parametrize("kind", list(sources(Path())))
def test_every_kind_gives_the_same_patches(kind: str, photo: Path) -> None:
    expected = batch_from_images([_IMAGE], _CONFIG)
    found = batch_from_sources(sources(photo)[kind], _CONFIG)
    np.testing.assert_array_equal(found.grid.rows, expected.grid.rows)
    np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)


def test_kinds_may_be_mixed_and_keep_their_order(photo: Path) -> None:
    turned = np.ascontiguousarray(_LEVELS[::-1])
    found = batch_from_sources([photo, turned, _IMAGE], _CONFIG)
    expected = batch_from_images([_IMAGE, Image.fromarray(turned), _IMAGE], _CONFIG)
    np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)
    # The control: the order shows.
    other = batch_from_sources([turned, photo, _IMAGE], _CONFIG)
    assert not np.array_equal(other.pixel_values, expected.pixel_values)


def encoded() -> bytes:
    file = io.BytesIO()
    _IMAGE.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (_LEVELS.astype(np.float32), ["uint8", "float32", "[90, 130, 3]"]),
        (_LEVELS.transpose(2, 0, 1), ["[3, 90, 130]"]),
        (_LEVELS[:0], ["[0, 130, 3]"]),
        (np.uint8(3), ["[]"]),
        (torch.zeros(3, 90, 130), ["float32"]),
        (encoded(), ["bytes"]),
        ([encoded()], ["bytes"]),
        (None, ["NoneType"]),
        ([None], ["NoneType"]),
        (3, ["int"]),
        ([], []),
        ("/nope.png", ["/nope.png"]),
    ],
    ids=repr,
)
def test_anything_else_is_refused_in_words(given: Any, facts: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        batch_from_sources(given, _CONFIG)
    assert all(fact in str(refusal.value) for fact in facts)


def test_the_image_is_named(photo: Path) -> None:
    with refused(InputError, "image 1", "float64"):
        batch_from_sources([photo, np.zeros((4, 4, 3))], _CONFIG)
