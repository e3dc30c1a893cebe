"""Launches of slots: images of like size, each in a slot of its own, whatever their order.

A launch has S slots of exactly L patches. Attention stays inside a slot, so that it costs S * L**2,
close to the sum of the images' squares. Two ways to fill the slots:

* `uniform`: two rows of `grid_thw` for each slot. The first is the image, the second its padding:
  (1, merge, k * merge) for the rest of the slot, or (0, merge, merge) where the image fills it. An
  unused slot is an image of one merge block, and padding.
* `equal`: one row for each slot, and every image fills its own. An unused slot is one image of L
  patches.

Patches of padding and of unused slots are zeros, from which every operation gives finite numbers.
An image's tokens are the first of its slot.

The best cut: let the images be sorted by size. Of any partition into groups there is one into
consecutive runs of the same counts that costs no more: give the largest images to the group of the
largest image, and so on; no group's largest image grows by it, and a launch's cost grows with its
largest image. So the best runs, which dynamic programming finds, are the best groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.engine_record import EngineAttention
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.models.minimax_m3_vl.slots import slot_rows
from mmvision_export.runtime.launch_planner import Launch, LaunchPlanner, refuse_larger
from mmvision_export.runtime.planner import LaunchLayout, Piece, Planner, joined_pieces

__all__ = [
    "FREE_LAUNCH_PATCHES",
    "SlotLaunch",
    "SlotPlanner",
    "SlotWay",
    "plan_slots",
    "planner_for_engine",
]

SlotWay = Literal["uniform", "equal"]

_ROWS_PER_SLOT: dict[SlotWay, int] = {"uniform": 2, "equal": 1}

FREE_LAUNCH_PATCHES = 1024
"""Most patches of a launch of several slots, of a graph that takes any: a larger launch is not faster,
and its activations need more memory. docs/attention.md has what was measured."""

_TIE = 1 + 1e-12
"""float64 holds counts up to 9e15 exactly; of larger ones, equal sums may differ by their rounding."""


@dataclasses.dataclass(frozen=True)
class SlotLaunch:
    """Images of a batch that run at once, one in a slot.

    Attributes:
        images: Their rows of `grid_thw`, slot by slot.
        slots: Slots, unused ones included.
        slot_patches: Patches of each.
        profile: Index of the engine's profile.
    """

    images: tuple[int, ...]
    slots: int
    slot_patches: int
    profile: int = 0


class _Slots(NamedTuple):
    """A size of launch: the profile it is in, how many slots, and of how many patches."""

    profile: int
    slots: int
    patches: int


def plan_slots(
    grid: PackedGrid, profiles: Sequence[Profile], costs: Costs, *, way: SlotWay = "uniform"
) -> list[SlotLaunch]:
    """Group the images of a batch into the launches that cost the least together.

    Of equal costs, the groups with fewer launches are taken.

    Args:
        grid: The batch's.
        profiles: The engine's buckets; none for a graph that takes slots of any number and length,
            of which a launch gets the length of its largest image.
        costs: What a launch costs.
        way: How slots are filled.

    Raises:
        InputError: An image is larger than every slot, or, of the way `equal`, fills none.
        ManifestError: A profile is no bucket of equal slots.
    """
    sizes = [_slots_of(index, profile, costs.config, way) for index, profile in enumerate(profiles)]
    _refuse_unfit(grid, sizes, costs.config, way)
    counts = np.array(grid.patches_per_image)
    order = np.argsort(counts, kind="stable")
    ascending = counts[order]
    tables: dict[int, tuple[npt.NDArray[np.float64], list[_Slots]]] = {}
    # The best groups of so many of the smallest images: operations, launches, and the last launch.
    operations = np.zeros(len(counts) + 1)
    launches = np.zeros(len(counts) + 1, np.int64)
    last: list[tuple[int, _Slots]] = []
    for end, size in enumerate(ascending.tolist(), start=1):
        if size not in tables:
            tables[size] = _by_count(size, len(counts), sizes, costs, way)
        of_count, chosen = tables[size]
        same = end - int(np.searchsorted(ascending, size))
        most = min(end if way == "uniform" else same, len(chosen))
        # A last launch of 1, 2, ..., most images.
        totals = operations[end - most : end][::-1] + of_count[:most]
        numbers = launches[end - most : end][::-1] + 1
        ties = totals <= totals.min() * _TIE
        count = int(np.argmin(np.where(ties, numbers, np.iinfo(np.int64).max))) + 1
        operations[end], launches[end] = totals[count - 1], numbers[count - 1]
        last.append((count, chosen[count - 1]))
    plan: list[SlotLaunch] = []
    end = len(counts)
    while end:
        count, slots = last[end - 1]
        # In the batch's order, so that what lies together there is copied together.
        images = tuple(sorted(order[end - count : end].tolist()))
        plan.append(SlotLaunch(images, slots.slots, slots.patches, slots.profile))
        end -= count
    return plan[::-1]


def _by_count(
    size: int, most: int, sizes: Sequence[_Slots], costs: Costs, way: SlotWay
) -> tuple[npt.NDArray[np.float64], list[_Slots]]:
    """The cheapest launch for 1, 2, ... images of which the largest has `size` patches.

    Args:
        size: Patches.
        most: Most images of a batch.
        sizes: Of the engine's launches; none for any.
        costs: What a launch costs.
        way: How slots are filled.

    Returns:
        Operations and launch for each count, as far as one launch can reach.
    """
    if not sizes:
        together = max(1, FREE_LAUNCH_PATCHES // size)
        chosen = [_Slots(0, count, size) for count in range(1, min(most, together) + 1)]
        return np.array([costs.uniform(s.slots, s.patches) for s in chosen], np.float64), chosen
    fitting = [s for s in sizes if (size == s.patches if way == "equal" else size <= s.patches)]
    by_cost = sorted((costs.uniform(s.slots, s.patches), s) for s in fitting)
    counts = range(1, min(most, max(s.slots for s in fitting)) + 1)
    cheapest = [next(pair for pair in by_cost if pair[1].slots >= count) for count in counts]
    return np.array([cost for cost, _ in cheapest], np.float64), [s for _, s in cheapest]


def _slots_of(index: int, profile: Profile, config: EncoderConfig, way: SlotWay) -> _Slots:
    slots, rest = divmod(profile.max_images, _ROWS_PER_SLOT[way])
    if rest or not profile.is_bucket or profile.max_patches % (slots * config.patches_per_token):
        raise ManifestError(
            f"profile {index} must be a bucket of equal slots with {_ROWS_PER_SLOT[way]} rows each, "
            f"got {profile.max_patches} patches in {profile.max_images} rows"
        )
    return _Slots(index, slots, profile.max_patches // slots)


def _refuse_unfit(
    grid: PackedGrid, sizes: Sequence[_Slots], config: EncoderConfig, way: SlotWay
) -> None:
    if not sizes:
        return
    taken = sorted({slots.patches for slots in sizes})
    refuse_larger(grid, taken[-1], config)
    if way == "uniform":
        return
    for image, (count, (t, h, w)) in enumerate(
        zip(grid.patches_per_image, grid.tuples(), strict=True)
    ):
        if count not in taken:
            side, frames = config.patch_size, f"{t} x " if t > 1 else ""
            raise InputError(
                f"image {image} has {count} patches ({frames}{w * side} x {h * side} pixels), the "
                f"engine takes images of exactly {', '.join(map(str, taken))} patches",
                hint="resize it to one of these, or build an engine whose slots take smaller images "
                "too",
            )


class SlotPlanner(Planner[SlotLaunch]):
    """Plans launches of slots for one engine or graph. See `Planner`.

    Args:
        profiles: The engine's buckets; none for a graph that takes any slots.
        costs: What a launch costs.
        way: How slots are filled.

    Raises:
        ManifestError: A profile is no bucket of equal slots.
    """

    def __init__(
        self, profiles: Sequence[Profile], costs: Costs, *, way: SlotWay = "uniform"
    ) -> None:
        super().__init__(costs.config)
        self._profiles = profiles
        self._costs = costs
        self._way: SlotWay = way
        self._slots = [_slots_of(i, p, costs.config, way) for i, p in enumerate(profiles)]
        self.largest_image = max((slots.patches for slots in self._slots), default=None)
        self.splitting = (
            "images of one size share a launch, whatever their order, and each fills a slot of its "
            "own: attention costs the square of an image"
            if way == "equal"
            else "images of like size share a launch, whatever their order, each in a slot of its "
            "own with its padding: attention costs the square of a slot"
        )

    def _planned(self, grid: PackedGrid) -> Sequence[SlotLaunch]:
        return plan_slots(grid, self._profiles, self._costs, way=self._way)

    def _layout(self, launch: SlotLaunch, grid: PackedGrid) -> LaunchLayout:
        bounds, length = grid.bounds, launch.slot_patches
        pieces = [
            Piece(
                slice(bounds[image], bounds[image + 1]),
                slice(slot * length, slot * length + bounds[image + 1] - bounds[image]),
            )
            for slot, image in enumerate(launch.images)
        ]
        rows = self._rows(launch, grid.rows[list(launch.images)])
        return LaunchLayout(launch.profile, rows, launch.slots * length, joined_pieces(pieces))

    def idle(self, profile: int) -> LaunchLayout:
        """See `Planner.idle`."""
        slots = self._slots[profile]
        launch = SlotLaunch((), slots.slots, slots.patches, profile)
        rows = self._rows(launch, np.empty((0, 3), np.int64))
        return LaunchLayout(profile, rows, slots.slots * slots.patches, [])

    def size_text(self, profile: int) -> str:
        """See `Planner.size_text`."""
        return str(self._profiles[profile])

    def _rows(self, launch: SlotLaunch, images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The launch's `grid_thw`: `[2 * slots, 3]`, or `[slots, 3]` of the way `equal`."""
        merge, length = self._costs.config.spatial_merge_size, launch.slot_patches
        in_slots = np.empty((launch.slots, 3), np.int64)
        in_slots[len(images) :] = (1, merge, length // merge if self._way == "equal" else merge)
        in_slots[: len(images)] = images
        if self._way == "equal":
            return in_slots
        return slot_rows(in_slots, length, self._costs.config)


def planner_for_engine(
    attention: EngineAttention, profiles: Sequence[Profile], config: EncoderConfig
) -> Planner[SlotLaunch] | Planner[Launch]:
    """What cuts batches for an engine.

    Raises:
        ManifestError: A profile does not suit the engine's way of attention.
    """
    if attention.way == "uniform" or attention.way == "equal":
        return SlotPlanner(profiles, Costs(config, masked=False), way=attention.way)
    return LaunchPlanner(profiles, Costs(config, masked=attention.masked))
