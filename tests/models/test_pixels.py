"""Images in memory: turned as Pillow turns them, converted as they were before, strip by strip."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl import pixels
from mmvision_export.models.minimax_m3_vl.images import image_from_file
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image, upright
from tests.support.errors import refused
from tests.support.hostile_images import exif_block, jpeg_with_exif


def in_one_piece(image: Image.Image) -> Image.Image:
    """The conversion written down once more, of the whole image at once."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image, dtype=np.int64)
        return Image.fromarray(np.rint(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(3)
    if mode.startswith("I"):
        levels = generator.integers(0, 65536, size[::-1])
        grey = Image.fromarray(levels.astype(np.int32 if mode == "I" else np.uint16))
        return grey if mode in ("I", "I;16") else grey.convert("I").convert(mode)
    image = Image.fromarray(generator.integers(0, 256, (*size[::-1], 4), dtype=np.uint8), "RGBA")
    if mode in ("P", "PA"):
        return image.convert("RGB").quantize(16).convert(mode)
    if mode in ("RGBa", "La"):
        return image.convert("RGBA" if mode == "RGBa" else "LA").convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize("transparency", [None, 3])
@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "RGB", "RGBA", "LA", "RGBa", "La", "CMYK", "I", "I;16"]
)
def test_strips_change_nothing(
    mode: str, transparency: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(mode, (61, 47))
    if transparency is not None:
        if mode not in ("L", "P", "RGB"):
            pytest.skip("a colour is transparent in images without alpha only")
        image.info["transparency"] = (3, 4, 5) if mode == "RGB" else transparency
    expected = np.asarray(in_one_piece(image))
    for strip_pixels in (1, 61 * 5 + 7, 1 << 21):
        monkeypatch.setattr(pixels, "_STRIP_PIXELS", strip_pixels)
        np.testing.assert_array_equal(np.asarray(rgb_from_image(image)), expected)


def test_integers_out_of_range_in_one_strip_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_STRIP_PIXELS", 10)
    levels = np.full((30, 10), 7, np.int32)
    rgb_from_image(Image.fromarray(levels))
    levels[17, 3] = 70000
    with refused(InputError, 7, 70000, 65535):
        rgb_from_image(Image.fromarray(levels))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_as_pillow_turns_it(form: str, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    turned: set[bytes] = set()
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        path = tmp_path / f"{orientation}.{form.lower()}"
        Image.fromarray(levels).save(path, form, exif=exif, **options)
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        found = image_from_file(path)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        turned.add(found.tobytes())
        # Turned once, and not again by who gets it.
        np.testing.assert_array_equal(np.asarray(upright(found)), np.asarray(expected))
    assert len(turned) == 8


def test_an_orientation_in_xmp_is_applied_once() -> None:
    buffer = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", (30, 20), "red").save(buffer, "JPEG", xmp=xmp)
    with Image.open(buffer) as image:
        once = upright(image)
    assert once.size == (20, 30)
    assert upright(once).size == (20, 30)


def test_a_transparent_colour_survives_turning() -> None:
    image = Image.new("L", (30, 20), 3)
    image.info.update(transparency=3, exif=b"Exif\0\0" + exif_block(6))
    found = rgb_from_image(upright(image))
    assert (found.size, found.getpixel((0, 0))) == ((20, 30), (255, 255, 255))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.integers(1, 400))
def test_damaged_exif_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, damage: bytes, length: int
) -> None:
    """No damage to the block raises anything but an `InputError`, and what is read is one of 8."""
    block = bytearray(exif_block(6))
    position %= len(block)
    block[position : position + len(damage)] = damage
    path = jpeg_with_exif(tmp_path_factory.mktemp("exif") / "a.jpg", bytes(block[:length]))
    try:
        found = image_from_file(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert found.size in ((60, 40), (40, 60))


def test_a_block_that_pillow_cannot_write_again(tmp_path: Path) -> None:
    """Reading the orientation is enough."""
    block = bytearray(exif_block(6))
    block[11] = 62  # the type and the number of values of the first entry are no longer of its tag
    path = jpeg_with_exif(tmp_path / "a.jpg", bytes(block))
    assert image_from_file(path).size == (40, 60)
    # The control: Pillow, which writes the block again, fails.
    with pytest.raises(TypeError), Image.open(path) as image:
        ImageOps.exif_transpose(image)
