"""Images in memory, upright and in 8-bit RGB.

What takes more than one copy of an image is done in strips, so that the peak is the image, upright,
and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from mmvision_export.core.errors import InputError

__all__ = ["rgb_from_image", "transposition_of", "upright"]

_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_PIXELS = 1 << 21


def transposition_of(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright, by its EXIF orientation; None if nothing has to be done.

    The block is read and never written again: Pillow cannot write every block that it reads.

    Raises:
        InputError: The image has an EXIF block that cannot be read.
    """
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # Pillow's EXIF reader raises whatever its steps do
        raise InputError(
            f"unreadable EXIF block: {type(error).__name__}: {error}",
            hint="remove the block, or save the image again",
            reason="unreadable",
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation shows it; itself, if it is upright.

    Raises:
        InputError: See `transposition_of`.
    """
    # Before its orientation is asked for: some formats turn it themselves when they are decoded.
    image.load()
    method = transposition_of(image)
    if method is None:
        return image
    turned = image.transpose(method)
    # The orientation is no longer so, wherever it was said.
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned


def rgb_from_image(image: Image.Image) -> Image.Image:
    """8-bit RGB.

    Transparency is composited onto white, as the processor does, and 16-bit grey scaled to 8 bits.

    Raises:
        InputError: The pixel type has no defined range (32-bit integers beyond 16 bits, floats).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise InputError(
            "floating-point pixels have no defined range", hint="convert the image to 8-bit RGB"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_from_integers(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _in_strips(image, "RGB", _on_white)
    return image.convert("RGB")


def _grey_from_integers(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit levels to 255.
    extremes: list[int] = []

    def scaled(strip: Image.Image) -> Image.Image:
        levels = np.asarray(strip, dtype=np.int64)
        extremes.extend((int(levels.min()), int(levels.max())))
        return Image.fromarray(np.rint(levels / 257).astype(np.uint8))

    grey = _in_strips(image, "L", scaled)
    if min(extremes) < 0 or max(extremes) > 65535:
        raise InputError(
            f"integer pixels must be within 0 and 65535, got {min(extremes)} to {max(extremes)}",
            hint="convert the image to 8-bit RGB",
        )
    return grey


def _on_white(strip: Image.Image) -> Image.Image:
    if strip.mode in ("La", "RGBa"):
        # Colours multiplied by alpha, which Pillow turns into RGB only by way of this.
        strip = strip.convert("LA" if strip.mode == "La" else "RGBA")
    strip = strip.convert("RGBA")
    white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, strip).convert("RGB")


def _in_strips(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """What `convert` makes of the image, for one that treats every pixel by itself."""
    result = Image.new(mode, image.size)
    for box in _strips(image.size):
        result.paste(convert(image.crop(box)), box)
    return result


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    rows = max(1, _STRIP_PIXELS // max(width, 1))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)
