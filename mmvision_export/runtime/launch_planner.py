"""Which launches a batch becomes.

Engine profiles to choose from, padding to a bucket, and cuts between whole images.

Padding is one trailing grid row whose patches are a segment of their own, and rows without patches
after it:

* Attention stays inside a segment, positions are counted from a segment's start, and everything else is computed patch
  by patch (token by token after the merger), so that no value of an image depends on what follows
  it. The tokens of the padding are the last ones, and are dropped.
* The padding row is (1, merge, k * merge), a valid grid: batches and buckets are whole merge blocks, hence so is what
  lies between them. Its patches are zeros, from which every operation gives finite numbers.
* A row (0, merge, merge) adds nothing to the cumulative lengths: its segment is empty, and no patch looks it up. Such
  rows bring `grid_thw` to a constant shape, so that one CUDA graph serves any number of images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import FLOOR_PATCHES, Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.runtime.planner import LaunchLayout, Piece, Planner

__all__ = [
    "ANY_SIZE",
    "Launch",
    "LaunchPlanner",
    "fitting_grid",
    "padding_rows",
    "plan_launches",
    "refuse_larger",
    "refuse_too_large",
    "refuse_uncut",
    "size_that_fits",
]

ANY_SIZE = Profile(min_patches=1, opt_patches=1024, max_patches=2**31 - 1, max_images=2**31 - 1)
"""The profile of a graph that takes every batch, and is cut only where that is cheaper."""


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


def plan_launches(grid: PackedGrid, profiles: Sequence[Profile], costs: Costs) -> list[Launch]:
    """Cut a batch between images into the launches that cost the least together.

    Each launch takes consecutive images, in the smallest profile they fit; of equal costs, the one
    with fewer launches is taken. The best cut is found by dynamic programming over the end of the
    last launch, looking back no further than a launch can reach.

    Args:
        grid: The batch's.
        profiles: The engine's.
        costs: What a launch costs.

    Raises:
        InputError: An image is larger than every profile (see `refuse_too_large`), or no cut suits
            the profiles' least sizes.
    """
    refuse_too_large(grid, profiles, costs.config)
    counts, bounds = grid.patches_per_image, grid.bounds
    # The smallest profile that takes a launch pads it least, with patches and with empty segments.
    by_size = sorted(
        range(len(profiles)),
        key=lambda index: (profiles[index].max_patches, profiles[index].max_images),
    )
    ascending = [(index, profiles[index]) for index in by_size]
    most_patches = _most_patches(grid, profiles, costs)
    most_images = max(profile.max_images for profile in profiles)
    # The best cut of so many images.
    best = [_Cut(operations=0, launches=0, first_image=0, profile=0)]
    for end in range(1, len(counts) + 1):
        least = _Cut(operations=math.inf, launches=0, first_image=0, profile=0)
        squares = 0
        for start in range(end - 1, max(-1, end - 1 - most_images), -1):
            patches = bounds[end] - bounds[start]
            if patches > most_patches:
                break
            squares += counts[start] ** 2
            for index, profile in ascending:
                if profile.takes(patches, end - start):
                    padding = profile.max_patches - patches if profile.is_bucket else 0
                    operations = best[start].operations + costs.of(
                        patches + padding, squares + padding**2
                    )
                    launches = best[start].launches + 1
                    if (operations, launches) < (least.operations, least.launches):
                        least = _Cut(operations, launches, start, index)
                    break
        best.append(least)
    plan: list[Launch] = []
    end = len(counts)
    while end:
        cut = best[end]
        if math.isinf(cut.operations):
            refuse_uncut(grid, profiles)
        images = slice(cut.first_image, end)
        plan.append(Launch(images, slice(bounds[images.start], bounds[end]), cut.profile))
        end = images.start
    return plan[::-1]


@dataclasses.dataclass(slots=True)
class _Cut:
    """The best cut of the first images of a batch: what it costs, and its last launch."""

    operations: float
    launches: int
    first_image: int
    profile: int


def _most_patches(grid: PackedGrid, profiles: Sequence[Profile], costs: Costs) -> int:
    """Most patches of a launch that a best cut can have."""
    most = max(profile.max_patches for profile in profiles)
    is_free = all(
        p.min_patches <= FLOOR_PATCHES and p.min_images == 1 and not p.is_bucket for p in profiles
    )
    if not (costs.masked and is_free):
        return most
    # A larger launch has a cut with the floor or more on both sides, which saves masked products
    # and costs nothing.
    return min(most, 2 * FLOOR_PATCHES + max(grid.patches_per_image))


class LaunchPlanner(Planner[Launch]):
    """Plans the launches of a packed batch for one engine or graph. See `Planner`.

    Args:
        profiles: The engine's; none for a graph that takes any size.
        costs: What a launch costs.
    """

    def __init__(self, profiles: Sequence[Profile], costs: Costs) -> None:
        super().__init__(costs.config)
        self._profiles = profiles or [ANY_SIZE]
        self._costs = costs
        self.largest_image = max((p.max_patches for p in profiles), default=None)
        self.splitting = (
            "batches are cut between images where counted operations say that is cheaper: attention is "
            + (
                "masked and costs the square of a launch"
                if costs.masked
                else "packed and costs the square of an image"
            )
        )

    def _planned(self, grid: PackedGrid) -> Sequence[Launch]:
        return plan_launches(grid, self._profiles, self._costs)

    def _layout(self, launch: Launch, grid: PackedGrid) -> LaunchLayout:
        patches = launch.patches
        count = patches.stop - patches.start
        piece = Piece(patches, slice(0, count))
        return self._padded(launch.profile, grid.rows[launch.images], count, [piece])

    def idle(self, profile: int) -> LaunchLayout:
        """See `Planner.idle`."""
        return self._padded(profile, np.empty((0, 3), np.int64), 0, [])

    def size_text(self, profile: int) -> str:
        """See `Planner.size_text`."""
        return str(self._profiles[profile])

    def _padded(
        self, index: int, rows: npt.NDArray[np.int64], count: int, pieces: Sequence[Piece]
    ) -> LaunchLayout:
        profile = self._profiles[index]
        padding = padding_rows(count, len(rows), profile, self._costs.config)
        padded = profile.max_patches if profile.is_bucket else count
        return LaunchLayout(index, np.concatenate([rows, padding]), padded, pieces)


def refuse_too_large(grid: PackedGrid, profiles: Sequence[Profile], config: EncoderConfig) -> None:
    """Refuse an image that no profile has room for, with its numbers and the size that would fit.

    Raises:
        InputError: Names the first image that is too large.
    """
    refuse_larger(grid, max(profile.max_patches for profile in profiles), config)


def refuse_larger(grid: PackedGrid, most: int, config: EncoderConfig) -> None:
    """Refuse an image of more patches than the engine takes, with its numbers and what would fit.

    Raises:
        InputError: Names the first image that is too large.
    """
    counts = grid.patches_per_image
    if max(counts) <= most:
        return
    image = next(index for index, count in enumerate(counts) if count > most)
    t, h, w = grid.tuples()[image]
    side, per_token = config.patch_size, config.patches_per_token
    frames = f"{t} x " if t > 1 else ""
    raise InputError(
        f"image {image} has {counts[image]} patches ({counts[image] // per_token} image tokens, "
        f"{frames}{w * side} x {h * side} pixels), the engine takes at most {most} "
        f"({most // per_token} image tokens); {size_that_fits((t, h, w), most, config)}",
        hint="resize it, with --resize-to-fit (resize_to_fit=True), or build an engine with a larger bucket, "
        "or open onnxruntime-tensorrt with a larger max_patches",
    )


def size_that_fits(row: tuple[int, int, int], most: int, config: EncoderConfig) -> str:
    """Which size of an image would have at most so many patches, in pixels, for people.

    Args:
        row: The image's t, h, w, in patches.
        most: Patches.
        config: The encoder's dimensions.
    """
    h, w = fitting_grid(*row, most, config)
    if h * w == 0:
        return f"no size with {row[0]} temporal patches fits"
    return f"{w * config.patch_size} x {h * config.patch_size} pixels would fit"


def fitting_grid(t: int, h: int, w: int, most: int, config: EncoderConfig) -> tuple[int, int]:
    """The largest grid near the shape of h x w of at most `most` patches.

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


def refuse_uncut(grid: PackedGrid, profiles: Sequence[Profile]) -> NoReturn:
    """Refuse a batch of which no cut suits the profiles' least sizes.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"the batch has {grid.num_patches} patches in {len(grid)} images, which cannot be "
        f"cut into launches that the engine takes ({_describe(profiles)})",
        hint="send more or larger images, or build an engine with a smaller --min-patches, or with --buckets",
    )


def _describe(profiles: Sequence[Profile]) -> str:
    return "; ".join(map(str, profiles))
