"""Image files: opened if they are images of a known format and size, and decoded.

What decides is the file's header, before anything of its pixels is decoded. A format that is not in
the list is never tried: Pillow starts Ghostscript for a PostScript file of any name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import (  # each registers its format
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from mmvision_export.core.errors import InputError
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image, upright

__all__ = ["FORMATS", "MAX_FILE_PIXELS", "EncodedImage", "image_from_file", "opened_image"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of what is opened. JPEG stands for MPO too, which telephones write."""

MAX_FILE_PIXELS = 178_956_970
"""Most pixels of an image or of a video's frame, unless another limit is chosen: Pillow's own."""

_BYTES_PER_PIXEL = 4  # of RGB and RGBA, as Pillow holds them
_SAMPLES, _BITS, _TILE_WIDTH, _TILE_LENGTH = 277, 258, 322, 323  # of TIFF


@dataclasses.dataclass(frozen=True, repr=False)
class EncodedImage:
    """An image file that is in memory, as from a table or a request.

    Attributes:
        name: What an error calls it.
        content: Bytes of the file.
    """

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def opened_image(
    source: Path | EncodedImage, *, max_pixels: int = MAX_FILE_PIXELS
) -> Iterator[ImageFile.ImageFile]:
    """An image file whose pixels are decoded as soon as somebody asks for them.

    Whatever goes wrong with the image in the block is said to be so of this file.

    Args:
        source: A regular file, or what one holds.
        max_pixels: Most pixels that its header may say.

    Raises:
        InputError: The file is missing, no regular file, in none of `FORMATS`, too large, or
            damaged; or the block raised an exception.
    """
    with _opened(source) as file:
        try:
            image = _identified(file)
            _refuse_oversized(image, max_pixels)
            yield image
        except InputError as error:
            raise InputError(f"{source}: {error}", hint=error.hint, reason=error.reason) from error
        except Exception as error:  # decoders raise whatever their steps do
            kind = "" if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: "
            raise InputError(
                f"{source}: not a readable image: {kind}{error}", reason="unreadable"
            ) from error


def image_from_file(path: Path, *, max_pixels: int = MAX_FILE_PIXELS) -> Image.Image:
    """Decode an image at its full size, upright (EXIF) and in 8-bit RGB (see `rgb_from_image`).

    Raises:
        InputError: See `opened_image`; or its pixel type has no defined range.
    """
    with opened_image(path, max_pixels=max_pixels) as image:
        return rgb_from_image(upright(image))


def _opened(source: Path | EncodedImage) -> BinaryIO:
    if isinstance(source, EncodedImage):
        return io.BytesIO(source.content)
    return opened_regular_file(source)


def _identified(file: BinaryIO) -> ImageFile.ImageFile:
    # As `Image.open` does it, but for its own limit, which is not ours to change for everybody.
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a string says what Pillow was built without
            continue
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            # Without a name: Pillow maps named files, and what is cut short while it is mapped ends
            # the process.
            return factory(file, "")
    raise InputError(
        f"not an image in an accepted format: {', '.join(FORMATS)}",
        hint="convert the image to PNG or JPEG",
        reason="unreadable",
    )


def _refuse_oversized(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"has {width} x {height} = {width * height} pixels; the limit is {max_pixels}",
            hint="raise the limit with --max-pixels if you trust the file",
            reason="unsafe",
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        piece_bytes, most = _bytes_of_a_piece(image), _BYTES_PER_PIXEL * max_pixels
        if piece_bytes > most:
            raise InputError(
                f"has tiles or strips of {piece_bytes} bytes, the limit is {most}",
                hint="raise the limit with --max-pixels if you trust the file",
                reason="unsafe",
            )


def _bytes_of_a_piece(image: TiffImagePlugin.TiffImageFile) -> int:
    """Of a tile, which may be larger than the image, or of a strip, which may be all of it."""
    tags = image.tag_v2
    width, height = tags.get(_TILE_WIDTH, image.size[0]), tags.get(_TILE_LENGTH, image.size[1])
    bits_per_pixel = int(tags.get(_SAMPLES, 1)) * int(max(tags.get(_BITS, (1,))))
    return int(width) * int(height) * bits_per_pixel // 8
