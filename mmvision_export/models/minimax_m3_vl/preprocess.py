"""Images to patches, as the checkpoint's processor does it, with Pillow and NumPy only.

The grid is the processor's exactly. Pixels differ from it by what Pillow's bicubic filter differs
from torchvision's, both antialiased on 8-bit images: a fraction of a level on average.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.core.files import read_json
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.images import rgb_from_image
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.resize import (
    DEFAULT_LONG_SIDE,
    LONG_SIDES,
    MAX_PIXELS,
    RESIZE_RULES,
    ResizeRule,
    size_by_area,
    size_by_long_side,
    size_in_box,
)

__all__ = [
    "PREPROCESSOR",
    "PreprocessorConfig",
    "batch_from_images",
    "patches_from_frames",
    "patches_from_image",
    "resized",
]

PREPROCESSOR = "preprocessor_config.json"
"""The name of its file, in a checkpoint and in a model directory."""

_BICUBIC = 3
_MAX_AREA = 451584  # 2,304 patches
_RESIZE, _LONG_SIDE, _MAX_SIZE = "resize", "max_long_side_pixel", "max_size"  # in the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessorConfig:
    """How an image becomes patches. Defaults are the released model's.

    Attributes:
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames in one patch; a still image is repeated to fill it.
        merge_size: Side of a merge block, in patches.
        resize: By which rule an image's size is chosen; servers of this model differ.
        min_pixels: Smallest area of a resized image, by the rule `area`.
        max_pixels: Largest area of a resized image.
        max_long_side: Longest side of a resized image by the rule `long-side`, in pixels.
        max_size: Largest height and width by the rule `box`, in pixels.
        image_mean: Per channel, of values scaled to [0, 1].
        image_std: Per channel.
        rescale_factor: Factor from 8-bit levels to [0, 1].
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resize: ResizeRule = "area"
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = _MAX_AREA
    max_long_side: int = DEFAULT_LONG_SIDE
    max_size: tuple[int, int] = (672, 672)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels must not exceed max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if self.resize not in RESIZE_RULES:
            raise ConfigError(
                f"resize must be one of {', '.join(RESIZE_RULES)}, got {self.resize!r}"
            )
        self._check_long_side()
        if len(self.max_size) != 2 or not all(
            type(side) is int and self.factor <= side <= LONG_SIDES[1] for side in self.max_size
        ):
            raise ConfigError(
                f"max_size must be two sides of {self.factor} to {LONG_SIDES[1]} pixels, "
                f"got {self.max_size!r}"
            )
        factor = self.rescale_factor
        if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
            raise ConfigError(f"rescale_factor must be a positive number, got {factor!r}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in values
            ):
                raise ConfigError(f"{name} must be three numbers, got {values!r}")
        if min(self.image_std) <= 0:
            raise ConfigError(f"image_std must be positive, got {self.image_std!r}")
        # So that what is made of images needs no other check.
        if not np.isfinite(self.normalised_levels).all():
            raise ConfigError(
                "rescale_factor, image_mean and image_std must give finite float32 values, got "
                f"{factor!r}, {self.image_mean!r} and {self.image_std!r}"
            )

    def _check_long_side(self) -> None:
        side, (least, most) = self.max_long_side, LONG_SIDES
        if type(side) is not int or not least <= side <= most or side % self.factor:
            raise ConfigError(
                f"max_long_side must be a multiple of {self.factor} from {least} to {most} pixels, "
                f"got {side!r}"
            )

    @functools.cached_property
    def normalised_levels(self) -> npt.NDArray[np.float32]:
        """What each 8-bit level becomes in each channel, `[3, 256]`."""
        scaled = np.arange(256) * self.rescale_factor
        mean, std = np.array(self.image_mean)[:, None], np.array(self.image_std)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):
            levels: npt.NDArray[np.float32] = ((scaled - mean) / std).astype(np.float32)
        return levels

    @property
    def factor(self) -> int:
        """Pixels that both sides of a resized image are a multiple of."""
        return self.patch_size * self.merge_size

    def within(self, max_patches: int) -> PreprocessorConfig:
        """The same, with images of at most so many patches.

        Raises:
            InputError: That is less than the smallest image has.
        """
        most = max_patches * self.patch_size**2
        if most < self.min_pixels:
            raise InputError(
                f"images have at least {self.min_pixels} pixels, which is more than {max_patches} patches",
                hint="build an engine with a larger bucket",
            )
        return dataclasses.replace(self, max_pixels=min(self.max_pixels, most))

    def by(
        self, rule: ResizeRule | None = None, *, max_long_side: int | None = None
    ) -> PreprocessorConfig:
        """The same, with sizes by another rule, whose own bounds replace those of this one.

        Args:
            rule: By which rule; this one's if None.
            max_long_side: For the rule `long-side`, in pixels.

        Raises:
            ConfigError: It is no rule, or has no long side, or not this one.
        """
        rule = self.resize if rule is None else rule
        if max_long_side is not None and rule != "long-side":
            raise ConfigError(
                f"only the resize rule long-side has a longest side, got {max_long_side} for {rule}"
            )
        changes: dict[str, Any] = {"resize": rule}
        if rule != self.resize:
            changes["max_pixels"] = _MAX_AREA if rule == "area" else MAX_PIXELS
        if max_long_side is not None:
            changes["max_long_side"] = max_long_side
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """The rule and its bounds, for people."""
        if self.resize == "long-side":
            return f"long-side: at most {self.max_long_side} pixels"
        if self.resize == "box":
            return f"box: at most {self.max_size[0]} x {self.max_size[1]} pixels"
        return f"area: {self.min_pixels} to {self.max_pixels} pixels"

    @classmethod
    def for_encoder(cls, config: EncoderConfig) -> PreprocessorConfig:
        """The released preprocessing with an encoder's patch dimensions."""
        return cls(
            patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size,
            merge_size=config.spatial_merge_size,
        )

    @classmethod
    def read(cls, path: Path, config: EncoderConfig) -> PreprocessorConfig:
        """Read a checkpoint's or a model directory's `preprocessor_config.json`.

        What it leaves out takes the default. `size: [672, 672]`, which the released file has, is
        known to be wrong and never used, and means the default.

        Raises:
            ManifestError: The file is missing or not JSON.
            ConfigError: A value is malformed, not implemented, or does not fit the encoder.
        """
        content = read_json(path)
        try:
            result = cls._from_dict(content, cls.for_encoder(config))
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error
        fitting = cls.for_encoder(config)
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if getattr(result, name) != getattr(fitting, name):
                raise ConfigError(
                    f"{path}: {name} must be the encoder's {getattr(fitting, name)}, got {getattr(result, name)}"
                )
        return result

    @classmethod
    def _from_dict(
        cls, content: Mapping[str, Any], default: PreprocessorConfig
    ) -> PreprocessorConfig:
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if content.get(name) not in (None, True):
                raise ConfigError(f"{name}: only true is implemented, got {content[name]!r}")
        if content.get("resample") not in (None, _BICUBIC):
            raise ConfigError(
                f"resample: only {_BICUBIC} (bicubic) is implemented, got {content['resample']!r}"
            )
        found = {
            field.name: content[field.name]
            for field in dataclasses.fields(cls)
            if content.get(field.name) is not None
        }
        if content.get(_LONG_SIDE) is not None:
            found["max_long_side"] = content[_LONG_SIDE]
        if found.get(_RESIZE, "area") != "area":
            found.setdefault("max_pixels", MAX_PIXELS)
        if found.get(_RESIZE) != "box":  # transformers' video processors have one, of another sense
            found.pop(_MAX_SIZE, None)
        for name in ("image_mean", "image_std", _MAX_SIZE):
            if name in found:
                found[name] = tuple(found[name])
        size = content.get("size")
        if isinstance(size, Mapping):
            if unknown := sorted(set(size) - {"shortest_edge", "longest_edge"}):
                raise ConfigError(
                    f"size: only shortest_edge and longest_edge are implemented, got {unknown}"
                )
            # In this processor's terms both are areas.
            found.setdefault("min_pixels", size.get("shortest_edge", default.min_pixels))
            found.setdefault("max_pixels", size.get("longest_edge", default.max_pixels))
        elif size not in (None, [672, 672]):
            raise ConfigError(
                f"size must be an object with shortest_edge and longest_edge, got {size!r}"
            )
        return dataclasses.replace(default, **found)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json`, as transformers reads it.

        transformers knows the rule `area` only; of another the file says so in fields of ours.
        """
        content = dataclasses.asdict(self)
        min_pixels, max_pixels = content.pop("min_pixels"), content.pop("max_pixels")
        rule, long_side = content.pop("resize"), content.pop("max_long_side")
        max_size = content.pop("max_size")
        chosen: dict[str, Any] = {
            "area": {},
            "long-side": {_RESIZE: rule, _LONG_SIDE: long_side},
            "box": {_RESIZE: rule, _MAX_SIZE: max_size},
        }[rule]
        return {
            "image_processor_type": "MiniMaxM3VLImageProcessor",
            "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
            "resample": _BICUBIC,
            **content,
            **chosen,
        }


def resized(height: int, width: int, config: PreprocessorConfig) -> tuple[int, int]:
    """Height and width, in pixels, that an image is resized to; see `resize.py` for the rules.

    Raises:
        InputError: The aspect ratio is over 200.
    """
    factor = config.factor
    if config.resize == "area":
        return size_by_area(
            height,
            width,
            factor=factor,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
    if config.resize == "long-side":
        size = size_by_long_side(height, width, factor=factor, max_long_side=config.max_long_side)
    else:
        size = size_in_box(height, width, factor=factor, max_size=config.max_size)
    if size[0] * size[1] <= config.max_pixels:
        return size
    # No server does that: it is what fits an engine, where that was asked for.
    return size_by_area(*size, factor=factor, min_pixels=1, max_pixels=config.max_pixels)


def patches_from_image(
    image: Image.Image, config: PreprocessorConfig
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Resize, normalise and cut one still image.

    Args:
        image: Any Pillow image; turned upright by its EXIF orientation, and converted by
            `rgb_from_image`.
        config: The preprocessing.

    Returns:
        pixel_values `[h*w, 3*T*P*P]` float32, in merge-block order, each patch flattened in
        (channel, frame, row, column) order; and its grid row (1, h, w), in patches.

    Raises:
        InputError: See `resized` and `rgb_from_image`.
    """
    return patches_from_frames([rgb_from_image(ImageOps.exif_transpose(image))], config)


def patches_from_frames(
    frames: Sequence[Image.Image], config: PreprocessorConfig
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Resize, normalise and cut consecutive frames, the last one repeated to fill a temporal patch.

    Args:
        frames: 8-bit RGB, all of one size.
        config: The preprocessing.

    Returns:
        pixel_values `[t*h*w, 3*T*P*P]` float32, temporal patches outermost, else as of
        `patches_from_image`; and the grid row (t, h, w), in patches.

    Raises:
        InputError: See `resized`.
    """
    height, width = resized(frames[0].height, frames[0].width, config)
    merge, side, depth = config.merge_size, config.patch_size, config.temporal_patch_size
    t, h, w = -(-len(frames) // depth), height // side, width // side
    table = config.normalised_levels
    patches = np.empty((t, h * w, 3, depth, side * side), dtype=np.float32)
    for index, frame in enumerate(frames):
        image = (
            frame
            if frame.size == (width, height)
            else frame.resize((width, height), Image.Resampling.BICUBIC)
        )
        levels = np.asarray(image, dtype=np.uint8).reshape(
            h // merge, merge, side, w // merge, merge, side, 3
        )
        # [block_row, row, y, block_column, column, x, C] -> [.., row, column, C, y, x] -> [N, C,
        # P*P]
        levels = levels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, side * side)
        # The last frame fills what is left of its temporal patch, all of it for a still image.
        depths = slice(index % depth, None if index == len(frames) - 1 else index % depth + 1)
        for channel in range(3):
            patches[index // depth, :, channel, depths] = table[channel][levels[:, channel, None]]
    return patches.reshape(t * h * w, -1), (t, h, w)


def batch_from_images(
    images: Iterable[Image.Image], config: PreprocessorConfig, *, names: Sequence[str] | None = None
) -> PackedBatch:
    """Pack several images, of any sizes, into one batch of float32 patches.

    Args:
        images: Any Pillow images.
        config: The preprocessing.
        names: What an error calls each of them; `image 0` and so on if None.

    Raises:
        InputError: No images, or one cannot be processed; the message says which.
    """
    pieces = []
    for index, image in enumerate(images):
        try:
            pieces.append(patches_from_image(image, config))
        except (InputError, OSError, ValueError) as error:
            name = f"image {index}" if names is None else names[index]
            raise InputError(f"{name}: {error}", hint=getattr(error, "hint", None)) from error
    if not pieces:
        raise InputError("no images were given", reason="missing")
    return PackedBatch.of_images(pieces, config.merge_size**2)
