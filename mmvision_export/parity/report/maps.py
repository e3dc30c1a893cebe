"""Error of each image token where it stands in its image, as small pictures that a page scales up.

A map has one pixel a token. The photograph behind a map is shown once, for all graphs, as a thumbnail.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.parity.samples import Sample

__all__ = ["ImageMaps", "TokenMap", "image_maps", "worst_images"]

_SHOWN_IMAGES = 6
_SHOWN_FRAMES = 4
_THUMBNAIL = 280  # pixels of the longer side
_NOT_FINITE = (0xD0, 0x00, 0xD0)
_SAME = 0.1
"""Two graphs whose errors differ by no more, token by token, share their maps."""


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """One image's errors for the runners that agree on them.

    Attributes:
        runners: What was compared.
        frames: For each frame a PNG with one pixel a token, as a data URI.
        least: Error of the darkest colour, of all images of these runners.
        most: Error of the brightest.
    """

    runners: list[str]
    frames: list[str]
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class ImageMaps:
    """One image of the sample.

    Attributes:
        name: File, or number.
        picture: A thumbnail as a data URI; None where there is no picture.
        tokens: Tokens of a frame, (height, width).
        maps: One for each group of runners.
    """

    name: str
    picture: str | None
    tokens: tuple[int, int]
    maps: list[TokenMap]


def image_maps(
    sample: Sample, errors: Mapping[str, npt.NDArray[np.float64]], merge: int
) -> list[ImageMaps]:
    """The images with the largest errors.

    Colours span what differs, from the least error of a group of runners to its most: a healthy map is
    speckle over all of them.

    Args:
        sample: The batch.
        errors: By runner, `[num_image_tokens]` relative L2 error, NaN where a value is not finite.
        merge: Patches per side of a token.
    """
    groups = _groups(errors)
    worst = np.max([np.where(np.isnan(each), np.inf, each) for each in errors.values()], axis=0)
    found = []
    for index in worst_images(sample, worst, merge):
        maps = []
        for runners in groups:
            values = errors[runners[0]]
            finite = values[np.isfinite(values)]
            least, most = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
            frames = _token_maps(sample, values, merge)[index][:_SHOWN_FRAMES]
            pictures = [_coloured(frame, float(least), float(most)) for frame in frames]
            maps.append(TokenMap(runners, pictures, float(least), float(most)))
        _, h, w = sample.grid_thw[index].tolist()
        found.append(
            ImageMaps(
                sample.files[index] if sample.pictures else f"image {index}",
                _thumbnail(sample.pictures[index]) if sample.pictures else None,
                (h // merge, w // merge),
                maps,
            )
        )
    return found


def worst_images(sample: Sample, errors: npt.NDArray[np.float64], merge: int) -> list[int]:
    """The images that are shown.

    Those with the largest errors, not finite ones first; in packing order.
    """
    unbounded = np.where(np.isnan(errors), np.inf, errors)
    worst = [float(tokens.max()) for tokens in _token_maps(sample, unbounded, merge)]
    return sorted(sorted(range(len(worst)), key=lambda i: -worst[i])[:_SHOWN_IMAGES])


def _groups(errors: Mapping[str, npt.NDArray[np.float64]]) -> list[list[str]]:
    """Runners that agree on every token's error."""
    groups: list[list[str]] = []
    for runner, values in errors.items():
        for group in groups:
            if np.allclose(errors[group[0]], values, rtol=_SAME, atol=0, equal_nan=True):
                group.append(runner)
                break
        else:
            groups.append([runner])
    return groups


def _token_maps(
    sample: Sample, errors: npt.NDArray[np.float64], merge: int
) -> list[npt.NDArray[np.float64]]:
    """Each image's errors in their place, `[t, h / merge, w / merge]`.

    Tokens are packed row by row, frame by frame.
    """
    maps, start = [], 0
    for t, h, w in sample.grid_thw.tolist():
        shape = (t, h // merge, w // merge)
        maps.append(errors[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return maps


def _coloured(errors: npt.NDArray[np.float64], least: float, most: float) -> str:
    """A PNG of `[height, width]` errors in matplotlib's `inferno`."""
    import matplotlib as mpl

    span = most - least
    scaled = np.zeros_like(errors) if span <= 0 else (errors - least) / span
    colours = mpl.colormaps["inferno"](np.nan_to_num(scaled), bytes=True)[..., :3].copy()
    colours[~np.isfinite(errors)] = _NOT_FINITE
    return _data_uri(Image.fromarray(colours), "PNG")


def _thumbnail(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _data_uri(small, "JPEG")


def _data_uri(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, **({"quality": 80} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
