"""Optimization profiles: the sizes that an engine accepts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from mmvision_export.core.errors import EngineError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "BUCKET_IMAGES",
    "DEFAULT_PROFILE",
    "DEFAULT_SLOTS",
    "Profile",
    "checked_profile",
    "profiles_from_buckets",
    "profiles_from_slots",
    "slots_for",
]

_OPT_IMAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimization profile: the sizes an engine accepts in it and the one it is fastest at.

    A profile of one size only is a *bucket*: smaller batches are padded to it (see
    `launch_planner.padding_rows`), so that every shape is static and one CUDA graph serves them
    all. A bucket may be cut into *slots* of equal length, each for one image and its padding.

    Attributes:
        min_patches: Fewest patches of a batch.
        opt_patches: Patches the kernels are chosen for.
        max_patches: Most patches of a batch, all images together.
        max_images: Most rows of `grid_thw`, in a bucket the padding's row among them.
        min_images: Fewest rows of `grid_thw`.
        slots: Slots of a bucket: each has as many patches and as many rows as any other. None where
            images follow one another.

    Raises:
        EngineError: A size is no positive integer, sizes do not ascend, or there are slots in what
            is no bucket or that cannot be cut into so many.
    """

    min_patches: int
    opt_patches: int
    max_patches: int
    max_images: int
    min_images: int = 1
    slots: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "slots" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EngineError(f"{name} must be a positive integer, got {value!r}")
        for names in (("min_patches", "opt_patches", "max_patches"), ("min_images", "max_images")):
            sizes = [getattr(self, name) for name in names]
            if sizes != sorted(sizes):
                raise EngineError(f"{', '.join(names)} must ascend, got {sizes}")
        if self.slots is not None:
            parts = (self.max_patches, self.max_images)
            if not self.is_bucket or any(size % self.slots for size in parts):
                raise EngineError(
                    f"slots must divide the max_patches and max_images of a bucket, got {self.slots} "
                    f"of {parts[0]} and {parts[1]}"
                )

    @property
    def rows_per_slot(self) -> int | None:
        """Rows of `grid_thw` for each slot: 2, an image and its padding, or 1, an image alone."""
        return None if self.slots is None else self.max_images // self.slots

    def __str__(self) -> str:
        """As `4 to 4096 patches in 1 to 64 images`, or `256 patches, 65 rows` of a bucket.

        Of slots `4 slots of at most 1024 patches`, or `exactly` where an image fills its slot.
        """
        if self.slots is not None:
            bound = "exactly" if self.rows_per_slot == 1 else "at most"
            return f"{self.slots} slots of {bound} {self.image_patches} patches"
        if self.is_bucket:
            return f"{self.max_patches} patches, {self.max_images} rows"
        return (
            f"{self.min_patches} to {self.max_patches} patches in {self.min_images} to "
            f"{self.max_images} images"
        )

    @property
    def image_patches(self) -> int:
        """Most patches of one image: of a slot, or of the whole launch."""
        return self.max_patches // (self.slots or 1)

    @functools.cached_property
    def is_bucket(self) -> bool:
        """Whether it accepts one size only."""
        return self.min_patches == self.max_patches and self.min_images == self.max_images

    def input_shapes(self, patch_dim: int) -> dict[str, tuple[tuple[int, int], ...]]:
        """Least, best and largest shape of each of the graph's inputs.

        Args:
            patch_dim: Values in one patch row.
        """
        patches = (self.min_patches, self.opt_patches, self.max_patches)
        opt_images = max(self.min_images, min(_OPT_IMAGES, self.max_images))
        images = (self.min_images, opt_images, self.max_images)
        return {
            "pixel_values": tuple((n, patch_dim) for n in patches),
            "grid_thw": tuple((n, 3) for n in images),
        }

    def takes(self, num_patches: int, num_images: int) -> bool:
        """Whether a batch fits, in a bucket after padding, which takes a row of its own."""
        if self.is_bucket:
            return (
                num_patches <= self.max_patches
                and num_images + (num_patches < self.max_patches) <= self.max_images
            )
        return (
            self.min_patches <= num_patches <= self.max_patches
            and self.min_images <= num_images <= self.max_images
        )


DEFAULT_PROFILE = Profile(min_patches=4, opt_patches=1024, max_patches=4096, max_images=64)
"""Where nobody says otherwise. A still image is at most 2304 patches with the released preprocessing."""

BUCKET_IMAGES = (8, DEFAULT_PROFILE.max_images)
"""Images of the profiles of a bucket, where nobody says otherwise: few, and as many as elsewhere."""

DEFAULT_SLOTS = ((1, 256), (1, 1024), (1, 4096), (4, 1024), (16, 256))
"""Slots and their length, where nobody says otherwise. No launch has more patches than `DEFAULT_PROFILE`
takes, hence no more activations: one image of up to 4,096 patches, or several smaller ones at once, since
a launch of less than some thousand patches does not fill a GPU."""


def slots_for(largest_image: int) -> list[tuple[int, int]]:
    """Slots and their length, where nobody says otherwise, with room for one image of so many patches.

    `DEFAULT_SLOTS`; beyond them one slot of the largest image, and one of two thirds of it, which is
    the area of a photograph of 3:2 in a square: 13,824 of 20,736 patches.
    """
    slots = list(DEFAULT_SLOTS)
    longest = max(length for _, length in slots)
    if largest_image > longest:
        # A slot is whole merge blocks of 4 patches, and a multiple of 64 suits the kernels' tiles.
        photograph = -(-(largest_image * 2 // 3) // 64) * 64
        if longest < photograph < largest_image:
            slots.append((1, photograph))
        slots.append((1, largest_image))
    return slots


def checked_profile(profile: Profile, config: EncoderConfig) -> Profile:
    """A profile that fits an encoder.

    Raises:
        EngineError: A number of patches is no multiple of the merge block, or there are more images
            than `max_patches` has room for.
    """
    per_token = config.patches_per_token
    for name in ("min_patches", "opt_patches", "max_patches"):
        _refuse_partial_blocks(name, getattr(profile, name), per_token)
    if profile.slots is not None:
        # Where an image fills its slot, the row of its padding counts no patches.
        _refuse_partial_blocks("a slot", profile.max_patches // profile.slots, per_token)
    elif profile.max_images > (most := profile.max_patches // per_token):
        raise EngineError(
            f"max_images must be between 1 and {most} (every image has at least {per_token} "
            f"patches), got {profile.max_images}"
        )
    return profile


def profiles_from_buckets(
    buckets: Sequence[int], max_images: Sequence[int], config: EncoderConfig
) -> list[Profile]:
    """Profiles of a single size: one for each bucket and number of images.

    Rows of `grid_thw` that a launch does not need are empty segments, for which a plugin's kernel
    still starts programs in every layer. A profile for few images keeps a small launch small.

    Args:
        buckets: Patches, in any order.
        max_images: Most images of a launch, one number or several, in any order; a bucket too small
            for them has room for as many as it has image tokens.
        config: Gives the size of a merge block.

    Returns:
        In ascending order of patches, then of images.

    Raises:
        EngineError: No buckets or numbers, one is given twice, or one is not a positive number of
            images or of whole merge blocks.
    """
    if not buckets or not max_images or min(max_images) < 1:
        raise EngineError(
            f"there must be at least one bucket and one image, got {list(buckets)} and "
            f"{list(max_images)}"
        )
    for name, numbers in (("bucket", buckets), ("number of images", max_images)):
        if len(set(numbers)) < len(numbers):
            raise EngineError(
                f"every {name} must be given once, got {', '.join(map(str, numbers))}"
            )
    profiles = []
    for size in sorted(buckets):
        _refuse_partial_blocks("a bucket", size, config.patches_per_token)
        # One row more, for the padding. Small buckets may have one profile for several numbers.
        most = size // config.patches_per_token
        profiles += [
            Profile(
                min_patches=size,
                opt_patches=size,
                max_patches=size,
                min_images=rows,
                max_images=rows,
            )
            for rows in sorted({min(images + 1, most) for images in max_images})
        ]
    return profiles


def profiles_from_slots(
    slots: Sequence[tuple[int, int]], rows_per_slot: int, config: EncoderConfig
) -> list[Profile]:
    """One profile of a single size for each pair of a number of slots and their length.

    Args:
        slots: (S, L): S slots of L patches each, in any order.
        rows_per_slot: Rows of `grid_thw`: 2 for an image and its padding, 1 for images that fill
            their slots.
        config: Gives the size of a merge block.

    Returns:
        Buckets of S * L patches and rows_per_slot * S rows, the smallest first.

    Raises:
        EngineError: No pairs, one is given twice, there are no slots, or their length is not a
            positive number of whole merge blocks; or `rows_per_slot` is neither 1 nor 2.
    """
    if rows_per_slot not in (1, 2):
        raise EngineError(f"rows_per_slot must be 1 or 2, got {rows_per_slot}")
    names = ", ".join(f"{count}x{patches}" for count, patches in slots)
    if not slots or min(count for count, _ in slots) < 1:
        raise EngineError(f"there must be at least one bucket with one slot, got {names or 'none'}")
    if len(set(slots)) < len(slots):
        raise EngineError(f"every bucket must be given once, got {names}")
    profiles = []
    for count, patches in sorted(slots, key=lambda pair: (pair[0] * pair[1], pair)):
        _refuse_partial_blocks("a slot", patches, config.patches_per_token)
        size, rows = count * patches, count * rows_per_slot
        profiles.append(
            Profile(
                min_patches=size,
                opt_patches=size,
                max_patches=size,
                min_images=rows,
                max_images=rows,
                slots=count,
            )
        )
    return profiles


def _refuse_partial_blocks(name: str, num_patches: int, per_token: int) -> None:
    if num_patches < per_token or num_patches % per_token:
        raise EngineError(
            f"{name} must be a positive multiple of {per_token} patches, got {num_patches}"
        )
