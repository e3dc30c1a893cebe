"""Preprocessing against transformers' processor and PyTorch's resize."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.images import image_from_file
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_images,
    patches_from_image,
    resized,
)
from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
from tests.support.errors import refused
from tests.support.images import from_transformers, photographs

CONFIG = PreprocessorConfig()


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_grid_is_the_processors(height: int, width: int) -> None:
    theirs = from_transformers("smart_resize")
    arguments = {"factor": 28, "min_pixels": CONFIG.min_pixels, "max_pixels": CONFIG.max_pixels}
    try:
        expected = theirs(height, width, **arguments)
    except ValueError:
        with refused(InputError, "aspect ratio", 200, f"{width} x {height}"):
            resized(height, width, CONFIG)
        return
    assert resized(height, width, CONFIG) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), (56, 56)),
        ((512, 512), (504, 504)),
        ((3000, 4000), (560, 756)),
        ((1, 200), (28, 812)),
        ((42, 42), (56, 56)),
    ],
)
def test_sizes_known_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    height, width = resized(*size, CONFIG)
    assert (height % 28, width % 28) == (0, 0)
    assert CONFIG.min_pixels <= height * width <= CONFIG.max_pixels
    assert (height, width) == expected


def test_patches_are_the_processors() -> None:
    """Order of patches and of their values, and normalisation, without resizing."""
    levels = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    patches, row = patches_from_image(Image.fromarray(levels), CONFIG)
    image = torch.from_numpy(levels).permute(2, 0, 1)[None].double() / 255
    image = (image - torch.tensor(CONFIG.image_mean)[:, None, None]) / torch.tensor(
        CONFIG.image_std
    )[:, None, None]
    expected, h, w = from_transformers("patchify")(None, image, 14, 2, 2)
    assert row == (1, h, w) == (1, 4, 8)
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, expected[0].numpy(), atol=1e-6)
    assert not np.allclose(
        patches[[0, 2, 1, 3]], expected[0, :4].numpy()
    )  # the control: the order matters


@pytest.mark.parametrize("size", [(280, 420), (560, 560), (756, 504)])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_pixels_are_near_torchvisions(name: str, size: tuple[int, int]) -> None:
    """torchvision resizes an 8-bit tensor with this function of PyTorch.

    Measured on these photographs: mean difference up to 0.2 levels, worst 7.
    """
    levels = photographs()[name]
    tensor = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(
        tensor, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    ours = np.asarray(Image.fromarray(levels).resize(size[::-1], Image.Resampling.BICUBIC))
    difference = np.abs(ours.astype(int) - theirs[0].permute(1, 2, 0).numpy())
    assert difference.mean() <= 0.2
    assert difference.max() <= 7


def test_several_images_are_packed_in_order() -> None:
    images = [
        Image.new("RGB", (w, h), colour) for w, h, colour in ((56, 84, "red"), (280, 56, "blue"))
    ]
    packed = batch_from_images(images, CONFIG)
    patches, grid = packed.pixel_values, packed.grid.rows
    assert grid.tolist() == [[1, 6, 4], [1, 4, 20]]
    np.testing.assert_array_equal(patches[:24], patches_from_image(images[0], CONFIG)[0])
    np.testing.assert_array_equal(patches[24:], patches_from_image(images[1], CONFIG)[0])


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    opened = image_from_file(saved(image, tmp_path / "a.png", exif=exif))
    assert opened.size == (60, 100)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.rotate(-90, expand=True)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_onto_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (60, 60), (0, 0, 0, 0)).convert(mode)
    assert image_from_file(saved(image, tmp_path / "a.png")).getpixel((5, 5)) == (255, 255, 255)
    half = Image.new("RGBA", (60, 60), (0, 0, 0, 128)).convert(mode)
    assert image_from_file(saved(half, tmp_path / "b.png")).getpixel((5, 5)) == (127, 127, 127)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (60, 60), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    assert image_from_file(saved(image, tmp_path / "a.png")).getpixel((0, 0)) == (200, 100, 50)
    assert image_from_file(saved(image, tmp_path / "b.png", transparency=1)).getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 60 * 60).reshape(60, 60).astype(np.uint16)
    opened = np.asarray(image_from_file(saved(Image.fromarray(levels), tmp_path / "a.png")))
    np.testing.assert_array_equal(opened[..., 0], np.rint(levels / 257))
    assert opened.shape == (60, 60, 3)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 60), (255, 255, 255)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode in ("YCbCr", "HSV"):
        patches, _ = patches_from_image(image, CONFIG)
        assert patches.shape == (16, 1176)
        return
    opened = image_from_file(saved(image, path))
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "truncated", "empty", "float", "32-bit", "folder"]
)
def test_unreadable_images_name_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    if kind == "text":
        path.write_text("not an image")
    elif kind == "truncated":
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "float":
        Image.new("F", (60, 60)).save(path)
    elif kind == "32-bit":
        Image.fromarray(np.full((60, 60), 70000, dtype=np.int32)).save(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(InputError) as caught:
        image_from_file(path)
    assert str(path) in str(caught.value)


def test_images_opened_elsewhere(tmp_path: Path) -> None:
    """The Python API does for a lazily opened image what `image_from_file` does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.new("RGB", (280, 112), "red"), tmp_path / "a.jpg", exif=exif)
    with Image.open(path) as lazy:
        _, row = patches_from_image(lazy, CONFIG)
    assert row == patches_from_image(image_from_file(path), CONFIG)[1] == (1, 20, 8)
    path.write_bytes(path.read_bytes()[:-300])
    with Image.open(path) as lazy, refused(InputError, "image 0"):
        batch_from_images([lazy], CONFIG)
    premultiplied = Image.new("RGBA", (60, 60), (0, 0, 0, 0)).convert("RGBa")
    assert rgb_from_image(premultiplied).getpixel((0, 0)) == (255, 255, 255)


def test_extreme_aspect_ratio_names_the_image() -> None:
    with refused(InputError, "image 1", 200, 601, 3):
        batch_from_images([Image.new("RGB", (60, 60)), Image.new("RGB", (601, 3))], CONFIG)
    with refused(InputError, "images", reason="missing"):
        batch_from_images([], CONFIG)


def read(tmp_path: Path, content: Any, resize: ResizeRule | None = None) -> PreprocessorConfig:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    return PreprocessorConfig.read(path, EncoderConfig(), resize=resize)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, CONFIG),
        ({"size": [672, 672]}, CONFIG),  # what the released file says, known to be wrong
        (
            {"size": {"shortest_edge": 3136, "longest_edge": 100352}},
            dataclasses.replace(CONFIG, max_pixels=100352),
        ),
        (
            {"max_pixels": 200704, "size": [672, 672]},
            dataclasses.replace(CONFIG, max_pixels=200704),
        ),
        ({"image_mean": [0.5, 0.5, 0.5]}, dataclasses.replace(CONFIG, image_mean=(0.5, 0.5, 0.5))),
        ({"resize": "long-side", "size": [672, 672]}, CONFIG.by("long-side")),
        (
            {"resize": "long-side", "max_long_side_pixel": 1008},
            CONFIG.by("long-side", max_long_side=1008),
        ),
        (
            {"resize": "box", "max_size": [1008, 672]},
            dataclasses.replace(CONFIG.by("box"), max_size=(1008, 672)),
        ),
        ({"max_size": [1, 2, 3]}, CONFIG),
        (
            {"do_resize": True, "resample": 3, "rescale_factor": 1 / 127.5},
            dataclasses.replace(CONFIG, rescale_factor=1 / 127.5),
        ),
    ],
)
def test_preprocessor_config(
    content: dict[str, Any], expected: PreprocessorConfig, tmp_path: Path
) -> None:
    assert read(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"do_normalize": False}, ["do_normalize", "true", False]),
        ({"resample": 2}, ["resample", 3, 2]),
        ({"size": [336]}, ["size", "shortest_edge", "longest_edge", [336]]),
        ({"size": [336, 336]}, ["size", "a box", "SGLang", "vLLM", [336, 336]]),
        ({"size": {"height": 672, "width": 672}}, ["size", "a box", "SGLang", "vLLM"]),
        ({"img_token_compression_config": {"spatial_merge_size": 3}}, ["merge_size", 2, 3]),
        ({"img_token_compression_config": 2}, ["img_token_compression_config", 2]),
        (
            {"img_token_compression_config": {"temporal_patch_size": 4}, "temporal_patch_size": 2},
            ["img_token_compression_config.temporal_patch_size", 2, 4],
        ),
        ({"size": {"height": 1}}, ["shortest_edge", "longest_edge", "height"]),
        ({"patch_size": 16}, ["patch_size", 14, 16]),
        ({"merge_size": 0}, ["merge_size", 0]),
        ({"image_std": [1, 0, 1]}, ["image_std", (1, 0, 1)]),
        # Positive numbers that no float32 holds what they give.
        ({"image_std": [1, 1e-40, 1]}, ["image_std", (1, 1e-40, 1)]),
        ({"rescale_factor": 1e300}, ["rescale_factor", 1e300]),
        # Integers that no float holds.
        ({"rescale_factor": 10**400}, ["rescale_factor"]),
        ({"image_mean": [0, 10**400, 0]}, ["image_mean"]),
        ({"rescale_factor": True}, ["rescale_factor", True]),
        ({"image_mean": [1, 2]}, ["image_mean", (1, 2)]),
        ({"image_mean": 7}, ["int"]),
        ({"rescale_factor": "x"}, ["rescale_factor", "'x'"]),
        ({"rescale_factor": 0}, ["rescale_factor", 0]),
        ({"min_pixels": 10**9}, ["min_pixels", "max_pixels", 10**9]),
        ({"min_pixels": 10**9, "max_pixels": 10**9}, ["min_pixels", 3584**2, 10**9]),
        ({"resize": "height"}, ["resize", "long-side", "'height'"]),
        ({"max_long_side_pixel": 2000}, ["max_long_side", 28, 112, 3584, 2000]),
        ({"max_long_side_pixel": 3612}, ["max_long_side", 28, 112, 3584, 3612]),
        ({"max_long_side_pixel": True}, ["max_long_side", True]),
        ({"resize": "box", "max_size": [672]}, ["max_size", 28, 3584, (672,)]),
        ({"resize": "box", "max_size": [672, 0]}, ["max_size", 28, 3584, (672, 0)]),
    ],
)
def test_preprocessor_config_refusals(
    content: dict[str, Any], facts: list[object], tmp_path: Path
) -> None:
    with refused(ConfigError, tmp_path, *facts):
        read(tmp_path, content)


M31 = {
    "patch_size": 14,
    "size": {"height": 1008, "width": 672},
    "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
}
"""The fields that SGLang 0.5.23 reads of a MiniMax-M3.1 checkpoint."""


def test_the_box_of_a_m31_checkpoint(tmp_path: Path) -> None:
    """Its `size` means a box to one server and nothing to another, so somebody has to choose."""
    box = dataclasses.replace(CONFIG.by("box"), max_size=(1008, 672))
    assert read(tmp_path, M31, "box") == box
    assert read(tmp_path, {**M31, "size": [1008, 672]}, "box") == box
    assert read(tmp_path, {**M31, "resize": "box"}) == box
    assert read(tmp_path, M31, "area") == CONFIG
    assert read(tmp_path, M31, "long-side") == CONFIG.by("long-side")
    # vLLM's processor saves both, and uses the area.
    vllm = {"size": {"height": 672, "width": 672}, "max_pixels": 451584}
    assert read(tmp_path, vllm) == CONFIG
    with refused(ConfigError, "size") as error:
        read(tmp_path, M31)
    assert error.value.hint is not None
    assert "--resize box" in error.value.hint
    # Another rule's area is not this one's bound.
    assert read(tmp_path, {"max_pixels": 200704}, "long-side") == CONFIG.by("long-side")


def test_a_rule_is_kept_in_the_file(tmp_path: Path) -> None:
    for config in (
        CONFIG,
        CONFIG.by("long-side"),
        CONFIG.by("long-side", max_long_side=1008),
        dataclasses.replace(CONFIG.by("box"), max_size=(1008, 672)),
    ):
        assert read(tmp_path, config.to_dict()) == config
    # A file of the default rule is that of transformers, with nothing of ours.
    assert not {"resize", "max_long_side_pixel", "max_size"} & set(CONFIG.to_dict())


def test_written_config_reads_back_and_is_the_processors(tmp_path: Path) -> None:
    assert read(tmp_path, CONFIG.to_dict()) == CONFIG
    assert SimpleNamespace(**CONFIG.to_dict()).size == {
        "shortest_edge": 4 * 28 * 28,
        "longest_edge": 451584,
    }


@given(
    height=st.integers(28, 6000),
    width=st.integers(28, 6000),
    rule=st.sampled_from(["area", "long-side", "box"]),
)
def test_no_image_has_more_patches_than_the_preprocessing_says(
    height: int, width: int, rule: Any
) -> None:
    config = PreprocessorConfig().by(rule)
    if max(height, width) > 200 * min(height, width):
        return
    new_height, new_width = resized(height, width, config)
    assert new_height * new_width // config.patch_size**2 <= config.most_patches


def test_the_largest_image_is_reached() -> None:
    """The bound is no looser than it must be: the side of a square of that area is a whole block."""
    for rule, expected in (("area", 2304), ("long-side", 20736), ("box", 2304)):
        config = PreprocessorConfig().by(rule)  # type: ignore[arg-type]
        height, width = resized(5000, 5000, config)
        assert height * width // config.patch_size**2 == config.most_patches == expected
