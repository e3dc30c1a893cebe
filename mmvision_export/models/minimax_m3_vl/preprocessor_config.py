"""How images become patches: sizes and normalisation, as `preprocessor_config.json` says them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.core.files import read_json
from mmvision_export.core.numbers import is_finite_number
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
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
    "resized",
]

PREPROCESSOR = "preprocessor_config.json"
"""The name of its file, in a checkpoint and in a model directory."""

_BICUBIC = 3
_MAX_AREA = 451584  # 2,304 patches
_RESIZE, _LONG_SIDE, _MAX_SIZE = "resize", "max_long_side_pixel", "max_size"  # in the file
_COMPRESSION = "img_token_compression_config"


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
        # Small images are enlarged to it, and a larger one may take all memory.
        if self.min_pixels > MAX_PIXELS:
            raise ConfigError(f"min_pixels must be at most {MAX_PIXELS}, got {self.min_pixels}")
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
        if not is_finite_number(factor) or factor <= 0:
            raise ConfigError(f"rescale_factor must be a positive number, got {factor!r}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(map(is_finite_number, values)):
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
        # JSON's numbers may be integers that no integer type of NumPy holds.
        scaled = np.arange(256) * float(self.rescale_factor)
        mean, std = (
            np.array(each, np.float64)[:, None] for each in (self.image_mean, self.image_std)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            levels: npt.NDArray[np.float32] = ((scaled - mean) / std).astype(np.float32)
        return levels

    @property
    def factor(self) -> int:
        """Pixels that both sides of a resized image are a multiple of."""
        return self.patch_size * self.merge_size

    @property
    def most_patches(self) -> int:
        """Most patches of a resized image: 2,304 by `area` as released, 20,736 by `long-side`."""
        areas: dict[ResizeRule, int] = {
            "area": self.max_pixels,
            "long-side": min(self.max_pixels, self.max_long_side**2),
            "box": min(self.max_pixels, self.max_size[0] * self.max_size[1]),
        }
        return areas[self.resize] // self.factor**2 * self.merge_size**2

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
    def read(
        cls, path: Path, config: EncoderConfig, *, resize: ResizeRule | None = None
    ) -> PreprocessorConfig:
        """Read a checkpoint's or a model directory's `preprocessor_config.json`.

        What it leaves out takes the default. `size: [672, 672]`, which the released file has, is
        known to be wrong and never used, and means the default.

        Args:
            path: The file.
            config: The encoder's dimensions, which the file's must be.
            resize: The rule that was chosen; None for the file's. By `box`, a `size` of a height
                and a width is the box, as SGLang reads it of a MiniMax-M3.1 checkpoint.

        Raises:
            ManifestError: The file is missing or not JSON.
            ConfigError: A value is malformed, not implemented, or does not fit the encoder; or the
                file does not tell by which rule its `size` is meant, and nobody chose.
        """
        content = read_json(path)
        try:
            result = cls._from_dict(content, cls.for_encoder(config), resize)
        except (ConfigError, TypeError, ValueError) as error:
            hint = error.hint if isinstance(error, ConfigError) else None
            raise ConfigError(f"{path}: {error}", hint=hint) from error
        fitting = cls.for_encoder(config)
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if getattr(result, name) != getattr(fitting, name):
                raise ConfigError(
                    f"{path}: {name} must be the encoder's {getattr(fitting, name)}, got {getattr(result, name)}"
                )
        return result

    @classmethod
    def _from_dict(
        cls, content: Mapping[str, Any], default: PreprocessorConfig, rule: ResizeRule | None
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
        _merge_compression(found, content.get(_COMPRESSION))
        if content.get(_LONG_SIDE) is not None:
            found["max_long_side"] = content[_LONG_SIDE]
        if rule is not None:
            found[_RESIZE] = rule
        if found.get(_RESIZE) != "box":  # transformers' video processors have one, of another sense
            found.pop(_MAX_SIZE, None)
        _merge_size(found, content.get("size"), default)
        own = content.get(_RESIZE) or "area"
        if found.get(_RESIZE, "area") != own:  # another rule's bound is none of this one
            found["max_pixels"] = _MAX_AREA if rule == "area" else MAX_PIXELS
        elif own != "area":
            found.setdefault("max_pixels", MAX_PIXELS)
        for name in ("image_mean", "image_std", _MAX_SIZE):
            if name in found:
                found[name] = tuple(found[name])
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


def _merge_compression(found: dict[str, Any], section: Any) -> None:
    """Merge what a MiniMax-M3.1 file says of merging in a section of its own."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise ConfigError(f"{_COMPRESSION} must be an object, got {section!r}")
    for name, key in (
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        if section.get(key) is not None and found.setdefault(name, section[key]) != section[key]:
            raise ConfigError(
                f"{_COMPRESSION}.{key} must be {name}'s {found[name]!r}, got {section[key]!r}"
            )


def _merge_size(found: dict[str, Any], size: Any, default: PreprocessorConfig) -> None:
    """Merge a file's `size`, which is two areas for transformers and a box for M3.1."""
    if size is None:
        return
    if isinstance(size, Mapping) and set(size) <= {"shortest_edge", "longest_edge"}:
        found.setdefault("min_pixels", size.get("shortest_edge", default.min_pixels))
        found.setdefault("max_pixels", size.get("longest_edge", default.max_pixels))
        return
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        sides = [size["height"], size["width"]]
    elif isinstance(size, list) and len(size) == 2:
        sides = size
    else:
        raise ConfigError(
            "size must be an object with shortest_edge and longest_edge, or with height and width, "
            f"got {size!r}"
        )
    if found.get(_RESIZE) == "box":
        found.setdefault(_MAX_SIZE, sides)
    # vLLM's processor writes a height and a width that it never uses, beside the area that it does.
    elif found.get(_RESIZE) is None and "max_pixels" not in found and size != [672, 672]:
        raise ConfigError(
            f"size: {size!r} does not determine the resize rule: SGLang's processor of MiniMax-M3.1 reads it as "
            "a box, vLLM's of MiniMax-M3 ignores it",
            hint="choose --resize box, or --resize area or long-side",
        )


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
