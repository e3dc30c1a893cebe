"""Images of every kind, upright and in 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmvision_export.core.errors import InputError

__all__ = ["image_from_file", "rgb_from_image"]


def image_from_file(path: Path) -> Image.Image:
    """Open an image, upright (EXIF) and in 8-bit RGB (see `rgb_from_image`).

    Raises:
        InputError: The file is missing, unreadable, truncated, too large, or of a pixel type with
            no defined range.
    """
    try:
        with warnings.catch_warnings():
            # Pillow refuses at twice the size it warns at; there is nothing to do about the
            # warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return rgb_from_image(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", reason="missing") from None
    except InputError as error:
        raise InputError(f"{path}: {error}", hint=error.hint) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not an image in a format Pillow reads", reason="unreadable"
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image: {error}", reason="unreadable") from error


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
        # Pillow's own conversion clips 16-bit levels to 255.
        levels = np.asarray(image, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError(
                f"integer pixels must be within 0 and 65535, got {levels.min()} to {levels.max()}",
                hint="convert the image to 8-bit RGB",
            )
        return Image.fromarray(np.rint(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode in (
        "La",
        "RGBa",
    ):  # colours multiplied by alpha, which Pillow turns into RGB only by way of this
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
