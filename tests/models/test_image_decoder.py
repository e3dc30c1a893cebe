"""Files to batches: without drafts equal to the bit, with drafts within a level, a few at a time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl import image_decoder
from mmvision_export.models.minimax_m3_vl.image_decoder import DRAFT_GAP, ImageDecoder
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_images,
    picture_from_image,
    resized,
)
from tests.support.errors import refused
from tests.support.hostile_images import png_of_zeros
from tests.support.images import from_transformers, natural, photographs
from tests.support.memory import peak_bytes

AREA = PreprocessorConfig()
SMALL = PreprocessorConfig(max_pixels=28 * 28 * 30)


def patches_written_down(path: Path, config: PreprocessorConfig) -> np.ndarray:
    """The preprocessing once more, in other words, of one file at its full size."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    height, width = resized(image.height, image.width, config)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    levels = np.asarray(image)
    values = np.stack([config.normalised_levels[c][levels[..., c]] for c in range(3)])
    merge, side = config.merge_size, config.patch_size
    blocks = values.reshape(
        3, height // (merge * side), merge, side, width // (merge * side), merge, side
    )
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, side * side)
    return np.repeat(patches, config.temporal_patch_size, axis=2).reshape(len(patches), -1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs in several formats, upright and not."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for index, (name, levels) in enumerate(photographs().items()):
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3, 8)[index]
        path = folder / f"{name}.{('jpg', 'png', 'webp', 'jpg')[index]}"
        Image.fromarray(levels).save(path, exif=exif)
        paths.append(path)
    return paths


@pytest.mark.parametrize("config", [AREA, SMALL, AREA.by("long-side"), AREA.by("box")], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_without_drafts_patches_are_equal_to_the_bit(
    photos: list[Path], config: PreprocessorConfig, threads: int
) -> None:
    batch = ImageDecoder(config, draft=False).batch(photos, threads=threads)
    expected = [patches_written_down(path, config) for path in photos]
    np.testing.assert_array_equal(batch.pixel_values, np.concatenate(expected))
    assert batch.grid.patches_per_image == [len(patches) for patches in expected]
    # The control: the order of the images shows.
    assert not np.array_equal(batch.pixel_values, np.concatenate(expected[::-1]))


def test_images_opened_elsewhere_make_the_same_batch(photos: list[Path]) -> None:
    expected = ImageDecoder(AREA, draft=False).batch(photos)
    for images in ([Image.open(path) for path in photos], (Image.open(path) for path in photos)):
        batch = batch_from_images(images, AREA)
        np.testing.assert_array_equal(batch.pixel_values, expected.pixel_values)
        np.testing.assert_array_equal(batch.grid.rows, expected.grid.rows)
    # The frames of one file are one object, which moves on.
    animation = photos[0].with_name("animation.gif")
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(animation, save_all=True, append_images=frames[1:])
    from PIL import ImageSequence

    with Image.open(animation) as image:
        batch = batch_from_images(ImageSequence.Iterator(image), AREA)
    np.testing.assert_array_equal(batch.pixel_values, batch_from_images(frames, AREA).pixel_values)
    assert len(np.unique(batch.pixel_values[:, 0])) > 1


def test_a_half_precision_batch_is_the_rounded_one(photos: list[Path]) -> None:
    decoder = ImageDecoder(AREA, draft=False)
    exact, half = decoder.batch(photos), decoder.batch(photos, dtype=np.float16)
    assert half.pixel_values.dtype == np.float16
    np.testing.assert_array_equal(half.pixel_values, exact.of_type(np.float16).pixel_values)
    # What float16 cannot hold is refused where it always was, with its row.
    wide = PreprocessorConfig(rescale_factor=1000)
    batch = ImageDecoder(wide).batch(photos[:1], dtype=np.float16)
    assert batch.pixel_values.dtype == np.float32
    with refused(InputError, "pixel_values", "float16"):
        batch.of_type(np.float16)


def levels_of(path: Path, config: PreprocessorConfig, *, draft: bool) -> np.ndarray:
    return np.asarray(ImageDecoder(config, draft=draft).picture(path)).astype(int)


@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_draft_is_within_a_level(tmp_path: Path, orientation: int, progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    natural(1301, 997).save(path, quality=92, exif=exif, progressive=progressive)
    full, draft = (levels_of(path, SMALL, draft=on) for on in (False, True))
    assert draft.shape == full.shape
    assert 0 < np.abs(draft - full).mean() <= 1
    # The control: a picture half a patch aside is not.
    assert np.abs(np.roll(draft, 7, axis=1) - full).mean() > 1


def test_drafts_only_where_they_are_large_enough(photos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for gap, drafted in ((2 * DRAFT_GAP, True), (2 * DRAFT_GAP - 0.2, False)):
        natural(round(gap * 168), round(gap * 140)).save(path)
        config = PreprocessorConfig(max_pixels=170 * 142)
        full, draft = (levels_of(path, config, draft=on) for on in (False, True))
        assert full.shape == (140, 168, 3)
        assert np.array_equal(full, draft) is not drafted
    for photo in photos[1:3]:  # other formats have none
        full, draft = (levels_of(photo, SMALL, draft=on) for on in (False, True))
        np.testing.assert_array_equal(full, draft)


@pytest.mark.parametrize("draft", [False, True])
def test_a_photograph_of_24_megapixels_has_the_servers_grid(tmp_path: Path, draft: bool) -> None:
    path = tmp_path / "a.jpg"
    Image.linear_gradient("L").resize((6000, 4000)).convert("RGB").save(path)
    theirs = from_transformers("smart_resize")(
        4000, 6000, factor=28, min_pixels=AREA.min_pixels, max_pixels=AREA.max_pixels
    )
    for config, (height, width) in ((AREA, theirs), (AREA.by("long-side"), (1344, 2016))):
        batch = ImageDecoder(config, draft=draft).batch([path])
        assert batch.grid.tuples() == [(1, height // 14, width // 14)]


def test_errors_name_the_file(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (601, 3)).save(tmp_path / "thin.jpg")
    decoder = ImageDecoder(AREA)
    with refused(InputError, tmp_path / "text.jpg", reason="unreadable"):
        decoder.batch([*photos, tmp_path / "text.jpg", tmp_path / "nothing.jpg"])
    with refused(InputError, tmp_path / "thin.jpg", 200):
        decoder.batch([tmp_path / "thin.jpg"])
    with refused(InputError, photos[0], 100, reason="unsafe"):
        ImageDecoder(AREA, max_pixels=100).batch(photos)
    with refused(InputError, "images", reason="missing"):
        decoder.batch([])


def test_decoded_images_together_stay_below_the_limit(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads, a limit of one large image: large ones wait, small ones go together."""
    lock, now, most, together = threading.Lock(), [0], [0], [0]
    decode = picture_from_image

    def watched(image: Image.Image, config: PreprocessorConfig) -> Image.Image:
        pixels = image.width * image.height
        with lock:
            now.append(pixels)
            most.append(sum(now))
            together.append(len(now) - 1)
        time.sleep(0.01)
        picture = decode(image, config)
        with lock:
            now.remove(pixels)
        return picture

    monkeypatch.setattr(image_decoder, "picture_from_image", watched)
    sizes = []
    for path in photos:
        with Image.open(path) as image:
            sizes.append(image.width * image.height)
    limit = max(sizes) + min(sizes)
    ImageDecoder(AREA, max_pixels=limit, draft=False).batch(photos * 4, threads=8)
    assert max(sizes) <= max(most) <= limit
    assert max(together) > 1


def test_many_large_images_are_not_decoded_before_the_first_is_cut(tmp_path: Path) -> None:
    """20 images of 4 megapixels, 16 MB each."""
    path = png_of_zeros(tmp_path / "a.png", 2000, 2000, colour=2)
    setup = f"""
from pathlib import Path
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.images import image_from_file
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
decoder, path = ImageDecoder(PreprocessorConfig(max_pixels=50176)), Path({str(path)!r})
"""
    assert 16e6 <= peak_bytes(setup, "decoder.batch([path] * 20, threads=2)") < 6 * 16e6
    # The control: kept until the last is there, they cost all of it.
    assert peak_bytes(setup, "images = [image_from_file(path) for _ in range(20)]") >= 20 * 16e6
