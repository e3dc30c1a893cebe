"""Optimization profiles: the sizes that an engine accepts."""

from __future__ import annotations

import dataclasses
import functools

from mmvision_export.core.errors import ManifestError

__all__ = ["Profile"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimization profile: the sizes an engine accepts in it and the one it is fastest at.

    A profile of one size only is a *bucket*: smaller batches are padded to it (see
    `launch_planner.padding_rows`), so that every shape is static and one CUDA graph serves them all.

    Attributes:
        min_patches: Fewest patches of a batch.
        opt_patches: Patches the kernels are chosen for.
        max_patches: Most patches of a batch, all images together.
        max_images: Most rows of `grid_thw`, in a bucket the padding's row among them.
        min_images: Fewest rows of `grid_thw`.
    """

    min_patches: int
    opt_patches: int
    max_patches: int
    max_images: int
    min_images: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ManifestError(f"{field.name} must be an integer, got {value!r}")

    @functools.cached_property
    def is_bucket(self) -> bool:
        """Whether it accepts one size only."""
        return self.min_patches == self.max_patches and self.min_images == self.max_images

    def takes(self, num_patches: int, num_images: int) -> bool:
        """Whether a batch fits, in a bucket after padding: the padding, if there is any, takes a row of its own."""
        if self.is_bucket:
            return (
                num_patches <= self.max_patches
                and num_images + (num_patches < self.max_patches) <= self.max_images
            )
        return (
            self.min_patches <= num_patches <= self.max_patches
            and self.min_images <= num_images <= self.max_images
        )
