"""Which launches a batch becomes: engine profiles to choose from, padding to a bucket, and cuts between whole images.

Padding is one trailing grid row whose patches are a segment of their own, and rows without patches after it:

* Attention stays inside a segment, positions are counted from a segment's start, and everything else is computed patch
  by patch (token by token after the merger), so that no value of an image depends on what follows it. The tokens of the
  padding are the last ones, and are dropped.
* The padding row is (1, merge, k * merge), a valid grid: batches and buckets are whole merge blocks, hence so is what
  lies between them. Its patches are zeros, from which every operation gives finite numbers.
* A row (0, merge, merge) adds nothing to the cumulative lengths: its segment is empty, and no patch looks it up. Such
  rows bring `grid_thw` to a constant shape, so that one CUDA graph serves any number of images.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "FLOOR_PATCHES",
    "Costs",
    "Launch",
    "LaunchPlanner",
    "padding_rows",
    "plan_launches",
    "refuse_too_large",
]

FLOOR_PATCHES = 256
"""A launch of fewer patches takes as long as one of this many: it reads every weight once, two bytes for the two
operations per patch, and GPUs from Orin to H100 do 150 to 420 float16 operations in the time of reading one byte."""

_REMEMBERED_PLANS = 64


@dataclasses.dataclass(frozen=True)
class Costs:
    """Operations of a launch, counted from the encoder's dimensions (a multiplication and an addition are two).

    Attributes:
        config: The encoder's dimensions.
        masked: Whether attention is one masked product over the whole launch, N^2, or stays within segments.
    """

    config: EncoderConfig
    masked: bool

    @functools.cached_property
    def per_patch(self) -> int:
        """Of everything but attention, for one patch."""
        c = self.config
        layer = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
        projector = (
            c.hidden_size * c.projector_hidden_size + c.projector_hidden_size * c.text_hidden_size
        )
        # The merger has one row for patches_per_token patches; its input is that many times as wide, which cancels out.
        merger = c.text_hidden_size * c.projector_hidden_size
        merger += c.projector_hidden_size * c.text_hidden_size // c.patches_per_token
        return 2 * (c.patch_dim * c.hidden_size + c.num_hidden_layers * layer + projector + merger)

    def of(self, patches: int, squares: int) -> int:
        """Of one launch.

        Args:
            patches: In all, padding included.
            squares: Sum over segments of their patches squared, padding included.
        """
        attended = patches**2 if self.masked else squares
        # q @ k and weights @ v, in every layer.
        attention = 4 * self.config.hidden_size * self.config.num_hidden_layers * attended
        return max(patches, FLOOR_PATCHES) * self.per_patch + attention


@dataclasses.dataclass(frozen=True)
class Launch:
    """Consecutive images of a batch that run at once.

    Attributes:
        images: Their rows of `grid_thw`.
        patches: Their rows of `pixel_values`.
        profile: Index of the engine's profile.
    """

    images: slice
    patches: slice
    profile: int


def padding_rows(
    num_patches: int, num_images: int, profile: Profile, config: EncoderConfig
) -> npt.NDArray[np.int64]:
    """Rows that bring a batch to the size of a bucket; none if the profile takes it as it is.

    Args:
        num_patches: Of the batch.
        num_images: Of the batch.
        profile: One that `takes` the batch.
        config: Gives the merge size.

    Returns:
        `[rows, 3]` int64, to follow the batch's own.
    """
    merge = config.spatial_merge_size
    if not profile.is_bucket:
        return np.empty((0, 3), np.int64)
    rows = np.empty((profile.max_images - num_images, 3), np.int64)
    rows[:] = (0, merge, merge)
    if padding := profile.max_patches - num_patches:
        rows[0] = (1, merge, padding // merge)
    return rows


def plan_launches(
    grid_thw: npt.NDArray[np.int64], profiles: Sequence[Profile], costs: Costs
) -> list[Launch]:
    """Cut a batch between images into the launches that cost the least together.

    Each launch takes consecutive images, in the smallest profile they fit; of equal costs, the one with fewer launches
    is taken. The best cut is found by dynamic programming over the end of the last launch, looking back no further than
    a launch can reach.

    Args:
        grid_thw: `[num_images, 3]`, valid.
        profiles: The engine's.
        costs: What a launch costs.

    Raises:
        InputError: An image is larger than every profile (see `refuse_too_large`), or no cut suits the profiles' least
            sizes.
    """
    refuse_too_large(grid_thw, profiles, costs.config)
    counts: list[int] = grid_thw.prod(axis=1).tolist()
    bounds = list(itertools.accumulate(counts, initial=0))
    # The smallest profile that takes a launch pads it least.
    ascending = sorted(enumerate(profiles), key=lambda item: item[1].max_patches)
    most_patches = ascending[-1][1].max_patches
    most_images = max(profile.max_images for profile in profiles)
    # By number of images: operations and number of launches of the best cut of so many; of its last launch, the first
    # image and the profile.
    best: list[tuple[float, int, int, int]] = [(0, 0, 0, 0)]
    for end in range(1, len(counts) + 1):
        least: tuple[float, int, int, int] = (math.inf, 0, 0, 0)
        squares = 0
        for start in range(end - 1, max(-1, end - 1 - most_images), -1):
            patches = bounds[end] - bounds[start]
            if patches > most_patches:
                break
            squares += counts[start] ** 2
            for index, profile in ascending:
                if profile.takes(patches, end - start):
                    padding = profile.max_patches - patches if profile.is_bucket else 0
                    operations = best[start][0] + costs.of(patches + padding, squares + padding**2)
                    launches = best[start][1] + 1
                    if (operations, launches) < least[:2]:
                        least = operations, launches, start, index
                    break
        best.append(least)
    plan: list[Launch] = []
    end = len(counts)
    while end:
        operations, _, start, index = best[end]
        if math.isinf(operations):
            raise InputError(
                f"the batch has {bounds[-1]} patches in {len(counts)} images, which cannot be cut into launches "
                f"that the engine takes ({_describe(profiles)})",
                hint="send more or larger images, or build an engine with a smaller --min-patches, or with --buckets",
            )
        plan.append(Launch(slice(start, end), slice(bounds[start], bounds[end]), index))
        end = start
    return plan[::-1]


class LaunchPlanner:
    """Plans the launches of one engine, and remembers the plans of the last grids: a camera always sends the same.

    Args:
        profiles: The engine's.
        costs: What a launch costs.
    """

    def __init__(self, profiles: Sequence[Profile], costs: Costs) -> None:
        def plan(grid: bytes) -> Sequence[Launch]:
            return tuple(
                plan_launches(np.frombuffer(grid, np.int64).reshape(-1, 3), profiles, costs)
            )

        self._plan = functools.lru_cache(maxsize=_REMEMBERED_PLANS)(plan)

    def __call__(self, grid_thw: npt.NDArray[np.int64]) -> Sequence[Launch]:
        """See `plan_launches`."""
        return self._plan(grid_thw.tobytes())


def refuse_too_large(
    grid_thw: npt.NDArray[np.int64],
    profiles: Sequence[Profile],
    config: EncoderConfig,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse an image that no profile has room for, with its numbers and the size that would fit.

    Args:
        grid_thw: `[num_images, 3]`, valid.
        profiles: The engine's; nothing is refused without any.
        config: Gives patch and merge sizes.
        names: What the error calls each image.

    Raises:
        InputError: Names the first image that is too large.
    """
    if not profiles:
        return
    most = max(profile.max_patches for profile in profiles)
    counts = grid_thw.prod(axis=1)
    if counts.max() <= most:
        return
    row = int(np.argmax(counts > most))
    t, h, w = grid_thw[row].tolist()
    fit_h, fit_w = fitting_grid(t, h, w, most, config)
    side, per_token = config.patch_size, config.patches_per_token
    name = f"image {row}" if names is None else names[row]
    frames = f"{t} x " if t > 1 else ""
    fits = (
        f"{fit_w * side} x {fit_h * side} pixels would fit"
        if fit_h * fit_w
        else f"no size with {t} temporal patches fits"
    )
    raise InputError(
        f"{name} has {counts[row]} patches ({counts[row] // per_token} image tokens, {frames}{w * side} x {h * side} "
        f"pixels), the engine takes at most {most} ({most // per_token} image tokens); {fits}",
        hint="resize it, with --resize-to-fit (resize_to_fit=True), or build an engine with a larger bucket",
    )


def fitting_grid(t: int, h: int, w: int, most: int, config: EncoderConfig) -> tuple[int, int]:
    """The largest grid near the shape of h x w, in whole merge blocks, of at most `most` patches in t temporal ones.

    Returns:
        Rows and columns, in patches; (0, 0) if not even one merge block of t temporal patches fits.
    """
    merge = config.spatial_merge_size
    blocks = most // (t * config.patches_per_token)
    if blocks == 0:
        return 0, 0
    shrink = (h * w / config.patches_per_token / blocks) ** 0.5
    rows = min(max(1, int(h / merge / shrink)), blocks)
    columns = min(max(1, int(w / merge / shrink)), blocks // rows)
    return rows * merge, columns * merge


def _describe(profiles: Sequence[Profile]) -> str:
    return "; ".join(
        f"{p.min_patches} to {p.max_patches} patches in {p.min_images} to {p.max_images} images"
        for p in profiles
    )
