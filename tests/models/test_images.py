"""Image files: known formats of bounded size, and nothing else."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.images import (
    FORMATS,
    MAX_FILE_PIXELS,
    image_from_file,
    opened_image,
)
from tests.support.errors import refused
from tests.support.hostile_images import fifo, ghostscript, png_of_zeros, tiff_with_tiles
from tests.support.memory import peak_bytes

SETUP = """
from pathlib import Path
from mmvision_export.models.minimax_m3_vl.images import image_from_file
"""
MB = 1 << 20


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_the_list_is_read(form: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (10, 200, 30))
    path = tmp_path / "a.dat"  # what decides is the content
    image.save(path, form)
    with opened_image(path) as opened:
        assert opened.format == form
    found = np.asarray(image_from_file(path)).astype(int)
    assert np.abs(found - np.asarray(image)).max() <= 8


def test_telephones_write_mpo(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "red")
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    assert image_from_file(tmp_path / "a.jpg").size == (60, 40)


def test_postscript_starts_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = ghostscript(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "photo.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n")
    with refused(InputError, path, *FORMATS, reason="unreadable"):
        image_from_file(path)
    assert not trace.exists()
    # The control: Pillow by itself starts it.
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(subprocess.CalledProcessError), Image.open(path) as image:
        image.load()
    assert trace.exists()


@pytest.mark.parametrize("form", ["ICO", "DDS", "TGA", "JPEG2000", "PCX", "SGI"])
def test_other_formats_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 32), "red").save(path, form)
    with refused(InputError, path, *FORMATS, reason="unreadable"):
        image_from_file(path)


def test_a_fifo_named_as_an_image(tmp_path: Path) -> None:
    with refused(InputError, tmp_path / "a.jpg", reason="unsafe"):
        image_from_file(fifo(tmp_path / "a.jpg"))


def test_a_limit_on_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (101, 100)).save(path)
    assert image_from_file(path, max_pixels=10100).size == (101, 100)
    with refused(InputError, path, 10100, 10099, reason="unsafe"):
        image_from_file(path, max_pixels=10099)


def test_a_limit_above_pillows_own_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image_from_file(path).size == (100, 100)


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels in 50 KB: nothing is decoded."""
    path = png_of_zeros(tmp_path / "a.png", 20000, 20000, bits=1)
    assert path.stat().st_size < MB
    with refused(InputError, path, 400_000_000, MAX_FILE_PIXELS, reason="unsafe"):
        image_from_file(path)
    assert peak_bytes(SETUP, f"image_from_file(Path({str(path)!r}))") < 20 * MB


@pytest.mark.parametrize(("bits", "colour", "most"), [(16, 0, 8), (8, 6, 10), (16, 6, 10)])
def test_what_is_allowed_is_decoded_in_bounded_memory(
    bits: int, colour: int, most: int, tmp_path: Path
) -> None:
    """The image, the result and some strips: it was 28 bytes a pixel for 16-bit grey."""
    pixels = 16_000_000
    path = png_of_zeros(tmp_path / "a.png", 4000, pixels // 4000, bits=bits, colour=colour)
    peak = peak_bytes(SETUP, f"image_from_file(Path({str(path)!r}))")
    assert 4 * pixels <= peak <= most * pixels + 64 * MB


def test_a_tile_larger_than_its_image(tmp_path: Path) -> None:
    path = tiff_with_tiles(tmp_path / "small.tif", 64, 256)
    assert image_from_file(path).size == (64, 64)
    path = tiff_with_tiles(tmp_path / "large.tif", 64, 4096)
    with refused(InputError, path, 4096**2, 4_000_000, reason="unsafe"):
        image_from_file(path, max_pixels=1_000_000)
    # The control: with a limit that lets it pass, the tile is what it costs.
    work = f"image_from_file(Path({str(path)!r}), max_pixels="
    assert peak_bytes(SETUP, work + "100_000_000)") > 14 * MB
    assert peak_bytes(SETUP, work + "1_000_000)") < 10 * MB


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_headers_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, form: str, damages: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.dat"
    Image.new("RGB", (60, 40), (10, 200, 30)).save(path, form)
    content = bytearray(path.read_bytes())
    for position, value in damages:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        image = image_from_file(path, max_pixels=10_000_000)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 10_000_000


def test_what_a_decoder_raises_is_the_images_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 40)).save(path)
    for error in (TypeError("x"), struct.error("x"), KeyError("x"), MemoryError(), EOFError()):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
        with refused(InputError, path, type(error).__name__, reason="unreadable"):
            image_from_file(path)
