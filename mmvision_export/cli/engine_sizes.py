"""The sizes of an engine, from the options of `mmvision build-engine`."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import typer

from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay

if TYPE_CHECKING:
    from mmvision_export.artifacts.profile import Profile
    from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["EngineSizes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSizes:
    """What was given; None is an option that was not.

    Attributes:
        buckets: Sizes in patches as `256,1024`, or slots and their length as `1x256,8x1024`.
        min_patches: Fewest patches of a batch.
        opt_patches: Patches the kernels are chosen for.
        max_patches: Most patches of a batch.
        max_images: Most images of a launch, for buckets several numbers as `8,64`.

    Raises:
        typer.BadParameter: The options do not go together, or `buckets` is neither form.
    """

    buckets: str | None = None
    min_patches: int | None = None
    opt_patches: int | None = None
    max_patches: int | None = None
    max_images: str | None = None

    def __post_init__(self) -> None:
        if self.buckets is not None and self._range_is_given:
            raise typer.BadParameter(
                "--buckets excludes --min-patches, --opt-patches and --max-patches"
            )
        if self.buckets is not None and not (self._patches or self._pairs):
            raise typer.BadParameter(
                "--buckets must be sizes in patches, as 256,1024, or slots and their length, as "
                f"1x256,8x1024, got {self.buckets!r}"
            )
        if self._pairs and self.max_images is not None:
            raise typer.BadParameter("--buckets of slots excludes --max-images")
        if len(self._images) > 1 and self.buckets is None:
            raise typer.BadParameter("--max-images takes several numbers only with --buckets")

    def profiles(
        self, attention: AttentionWay, config: EncoderConfig, *, largest_image: int
    ) -> list[Profile]:
        """The profiles that were asked for.

        Without any size, ways whose launches are slots get `slots_for` the largest image, and the
        others `DEFAULT_PROFILE`, with room for it.

        Args:
            attention: How the engine shall do attention.
            config: The encoder's dimensions.
            largest_image: Most patches of an image by the model directory's preprocessing.

        Raises:
            EngineError: The sizes cannot be those of an engine.
        """
        from mmvision_export.artifacts.profile import (
            BUCKET_IMAGES,
            DEFAULT_PROFILE,
            Profile,
            profiles_from_buckets,
            profiles_from_slots,
            slots_for,
        )

        default = DEFAULT_PROFILE
        # An engine for slots that `auto` builds takes any images, so each slot has its padding.
        rows_per_slot = SLOT_WAYS.get(attention, 2)
        if self._pairs:
            return profiles_from_slots(self._pairs, rows_per_slot, config)
        if attention in SLOT_WAYS and self._nothing_is_given:
            return profiles_from_slots(slots_for(largest_image), rows_per_slot, config)
        if self._patches:
            return profiles_from_buckets(self._patches, self._images or BUCKET_IMAGES, config)
        most = self.max_patches
        if most is None:
            most = max(default.max_patches, largest_image)
        return [
            Profile(
                min_patches=default.min_patches if self.min_patches is None else self.min_patches,
                opt_patches=(
                    min(default.opt_patches, most) if self.opt_patches is None else self.opt_patches
                ),
                max_patches=most,
                max_images=self._images[0] if self._images else default.max_images,
            )
        ]

    def slots(
        self, attention: AttentionWay, config: EncoderConfig, *, largest_image: int
    ) -> list[Profile]:
        """The profiles to take instead, where `auto` finds that images must take slots.

        None where a size or a way was given, which stands.

        Args:
            attention: How the engine shall do attention.
            config: The encoder's dimensions.
            largest_image: Most patches of an image by the model directory's preprocessing.
        """
        from mmvision_export.artifacts.profile import profiles_from_slots, slots_for

        if attention != "auto" or not self._nothing_is_given:
            return []
        return profiles_from_slots(slots_for(largest_image), SLOT_WAYS["uniform"], config)

    @property
    def _nothing_is_given(self) -> bool:
        return self.buckets is None and self.max_images is None and not self._range_is_given

    @property
    def _range_is_given(self) -> bool:
        sizes = (self.min_patches, self.opt_patches, self.max_patches)
        return any(size is not None for size in sizes)

    @property
    def _images(self) -> list[int]:
        if self.max_images is None:
            return []
        try:
            return [int(part) for part in self.max_images.split(",")]
        except ValueError:
            raise typer.BadParameter(
                f"--max-images must be integers with commas between, got {self.max_images!r}"
            ) from None

    @property
    def _patches(self) -> list[int]:
        """The buckets as sizes in patches; none if they are of the other form."""
        parts = (self.buckets or "").split(",")
        is_form = all(re.fullmatch(r"\s*-?\d+\s*", part) for part in parts)
        return [int(part) for part in parts] if is_form else []

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """The buckets as slots and their length; none if they are of the other form."""
        found = [
            re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part)
            for part in (self.buckets or "").split(",")
        ]
        pairs = [(int(match[1]), int(match[2])) for match in found if match is not None]
        return pairs if len(pairs) == len(found) else []
