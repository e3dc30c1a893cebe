"""Images in slots: what the slots do to the numbers (nothing), and which groups are chosen."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.artifacts.engine_record import EngineAttention
from mmvision_export.artifacts.manifest import GRAPH, UNIFORM_GRAPH
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import FLOOR_PATCHES, Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.runtime.launch_planner import ANY_SIZE, LaunchPlanner, plan_launches
from mmvision_export.runtime.planner import LaunchLayout, Piece, joined_pieces, run_layouts
from mmvision_export.runtime.slot_planner import (
    FREE_LAUNCH_PATCHES,
    SlotLaunch,
    SlotPlanner,
    SlotWay,
    plan_slots,
    planner_for_engine,
)
from tests.support.configs import HEAD_DIM_80, batch, grids, relative_l2
from tests.support.errors import refused
from tests.support.slots import slot_profiles

Grid = list[tuple[int, int, int]]
FULL = EncoderConfig()
COSTS = Costs(FULL, masked=False)


def of(rows: Any) -> PackedGrid:
    return PackedGrid(np.array(rows, dtype=np.int64), FULL.patches_per_token)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [item for item in rest if item not in others]
            for groups in partitions(left):
                yield [[first, *others], *groups]


def cost_of(launches: list[SlotLaunch], costs: Costs) -> int:
    return sum(costs.uniform(launch.slots, launch.slot_patches) for launch in launches)


@st.composite
def slot_plans(draw: st.DrawFn) -> tuple[PackedGrid, list[tuple[int, int]], Costs]:
    """Up to six images, and buckets (S, L) that take each of them, or none."""
    scale = draw(st.sampled_from([1, 5]))  # below the floor of a launch's cost, and around it
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=6))
    grid = of([(1, 2, 2 * scale * size) for size in sizes])
    pairs: list[tuple[int, int]] = []
    if draw(st.booleans()):
        drawn = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 25)), max_size=4))
        pairs = [(slots, 4 * scale * length) for slots, length in drawn]
        pairs.append((draw(st.integers(1, 3)), 4 * scale * max(sizes)))
    return grid, pairs, draw(st.sampled_from([COSTS, Costs(HEAD_DIM_80, masked=False)]))


@settings(max_examples=60)
@given(slot_plans())
def test_no_other_groups_cost_less(plan: tuple[PackedGrid, list[tuple[int, int]], Costs]) -> None:
    grid, pairs, costs = plan
    counts = grid.patches_per_image
    launches = plan_slots(grid, slot_profiles(pairs), costs)
    assert sorted(image for launch in launches for image in launch.images) == list(
        range(len(counts))
    )
    for launch in launches:
        assert len(launch.images) <= launch.slots
        assert max(counts[image] for image in launch.images) <= launch.slot_patches
        if pairs:
            assert pairs[launch.profile] == (launch.slots, launch.slot_patches)

    def cheapest(group: list[int]) -> float:
        largest = max(counts[image] for image in group)
        # Of a graph that takes any size, several images share a launch up to a bound.
        fits = len(group) == 1 or len(group) * largest <= FREE_LAUNCH_PATCHES
        free = [(len(group), largest)] if fits else []
        options = [
            costs.uniform(slots, length)
            for slots, length in pairs or free
            if len(group) <= slots and largest <= length
        ]
        return min(options, default=float("inf"))

    found = [
        (sum(map(cheapest, groups)), len(groups)) for groups in partitions([*range(len(counts))])
    ]
    assert (cost_of(launches, costs), len(launches)) == min(found)


@given(grid=grids(max_images=8), scale=st.integers(1, 4))
def test_it_costs_no_more_than_the_masked_cut(grid: Grid, scale: int) -> None:
    """Where no image is below the floor: masked, small images share a floor, which slots may not."""
    large = of([(t, scale * h, -(-FLOOR_PATCHES // (scale * h * w)) * w) for t, h, w in grid])
    masked = Costs(FULL, masked=True)
    bounds = large.bounds
    cut = sum(
        masked.of(bounds[launch.images.stop] - bounds[launch.images.start], 0)
        for launch in plan_launches(large, [ANY_SIZE], masked)
    )
    assert cost_of(plan_slots(large, [], COSTS), COSTS) <= cut


def test_a_launch_of_slots_costs_the_sum_of_its_slots() -> None:
    for slots, length in ((1, 1024), (4, 1024), (16, 256)):
        assert COSTS.uniform(slots, length) == COSTS.of(slots * length, slots * length**2)
    assert COSTS.uniform(1, 4096) == Costs(FULL, masked=True).of(4096, 0)


def test_images_of_like_size_meet_whatever_their_order() -> None:
    grid = of([(1, 32, 32), (1, 16, 16), (1, 32, 32), (1, 16, 16), (1, 30, 32)])
    profiles = slot_profiles([(1, 256), (2, 256), (3, 1024), (1, 1024)])
    assert plan_slots(grid, profiles, COSTS) == [
        SlotLaunch((1, 3), 2, 256, 1),
        SlotLaunch((0, 2, 4), 3, 1024, 2),
    ]


def test_a_launch_of_several_slots_has_a_bound() -> None:
    launches = plan_slots(of([(1, 16, 16)] * 9 + [(1, 80, 80)] * 2), [], COSTS)
    assert [(launch.slots, launch.slot_patches) for launch in launches] == [
        (4, 256),
        (4, 256),
        (1, 256),
        (1, 6400),
        (1, 6400),
    ]
    assert FREE_LAUNCH_PATCHES == 4 * 256


def test_a_thousand_images_are_planned_quickly() -> None:
    generator = np.random.default_rng(0)
    grid = of([(1, 2, 2 * int(n)) for n in generator.integers(1, 3500, 1000)])
    for profiles in ([], slot_profiles([(1, 14000), (4, 4096), (16, 1024), (64, 256)])):
        start = time.process_time()
        launches = plan_slots(grid, profiles, COSTS)
        assert time.process_time() - start < 0.5  # 0.03 s on a quiet core
        assert sum(len(launch.images) for launch in launches) == 1000


def opened(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(exported: Path) -> onnxruntime.InferenceSession:
    """The portable graph, which takes any packed batch, and slots are one."""
    return opened(exported / GRAPH)


@pytest.fixture(scope="module", params=[GRAPH, UNIFORM_GRAPH])
def slotted(exported: Path, request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    """The portable graph, and the one for slots, which takes nothing else."""
    return opened(exported / request.param)


def run(session: onnxruntime.InferenceSession, pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    (out,) = session.run(None, {"pixel_values": pixels, "grid_thw": rows})
    result: np.ndarray = out
    return result


def alone(
    session: onnxruntime.InferenceSession, pixels: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    bounds = np.cumsum([0, *rows.prod(axis=1)])
    return np.concatenate(
        [
            run(session, pixels[a:b], rows[[i]])
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
    )


SMALL = Costs(HEAD_DIM_80, masked=False)


@settings(max_examples=15)
@given(grid=grids(), seed=st.integers(0, 99), pairs=st.sampled_from([[], [(3, 100), (2, 40)]]))
def test_slots_change_nothing(
    session: onnxruntime.InferenceSession,
    slotted: onnxruntime.InferenceSession,
    grid: Grid,
    seed: int,
    pairs: list[tuple[int, int]],
) -> None:
    if pairs:
        grid = [(1, h, w) for _, h, w in grid]
    pixels, rows = batch(grid, HEAD_DIM_80, seed)
    planner = SlotPlanner(slot_profiles(pairs), SMALL)
    result = run_layouts(
        planner.layouts(of(rows)),
        PackedBatch(pixels, of(rows)),
        lambda patches, slots: run(slotted, patches, slots),
    )
    assert relative_l2(result, alone(session, pixels, rows)) <= 1e-5


def broken(layout: LaunchLayout, fault: str) -> LaunchLayout:
    first, second = layout.pieces
    if fault == "slots swapped":
        pieces = [Piece(first.batch, second.launch), Piece(second.batch, first.launch)]
    else:  # the tokens of padding for those of the image
        end = layout.num_patches
        count = second.batch.stop - second.batch.start
        pieces = [first, Piece(second.batch, slice(end - count, end))]
    return dataclasses.replace(layout, pieces=pieces)


@pytest.mark.parametrize("fault", ["slots swapped", "padding given"])
def test_the_comparison_can_fail(session: onnxruntime.InferenceSession, fault: str) -> None:
    pixels, rows = batch([(1, 4, 6), (1, 4, 6)], HEAD_DIM_80)
    whole = PackedBatch(pixels, of(rows))
    (layout,) = SlotPlanner(slot_profiles([(2, 60)]), SMALL).layouts(of(rows))
    tokens = run(session, layout.gathered(pixels), layout.rows)
    expected = alone(session, pixels, rows)
    right, wrong = np.empty_like(expected), np.empty_like(expected)
    layout.scatter(tokens, right, whole.grid.patches_per_token)
    broken(layout, fault).scatter(tokens, wrong, whole.grid.patches_per_token)
    assert relative_l2(right, expected) <= 1e-5
    assert relative_l2(wrong, expected) > 1e-2


def test_rows_of_a_launch() -> None:
    (profile,) = profiles = slot_profiles([(4, 24)])
    assert profile.is_bucket
    planner = SlotPlanner(profiles, COSTS)
    (layout,) = planner.layouts(of([(1, 4, 6), (1, 2, 4), (1, 4, 2)]))
    # The two of one size lie together in the batch and in neither's slot.
    assert layout.rows.tolist() == [
        [1, 4, 6],
        [0, 2, 2],
        [1, 2, 4],
        [1, 2, 8],
        [1, 4, 2],
        [1, 2, 8],
        [1, 2, 2],
        [1, 2, 10],
    ]
    assert [piece.launch for piece in layout.pieces] == [slice(0, 32), slice(48, 56)]
    assert layout.gaps == [slice(32, 48), slice(56, 96)]
    idle = planner.idle(0)
    assert idle.rows.tolist() == [[1, 2, 2], [1, 2, 10]] * 4
    assert (idle.pieces, idle.gaps) == ([], [slice(0, 96)])


def test_rows_of_images_that_fill_their_slots() -> None:
    planner = SlotPlanner(slot_profiles([(3, 24)], rows_per_slot=1), COSTS, way="equal")
    (layout,) = planner.layouts(of([(1, 4, 6), (1, 6, 4)]))
    assert layout.rows.tolist() == [[1, 4, 6], [1, 6, 4], [1, 2, 12]]
    assert [piece.launch for piece in layout.pieces] == [slice(0, 48)]
    assert planner.idle(0).rows.tolist() == [[1, 2, 12]] * 3


def test_equal_slots_take_each_size_in_its_own_launch() -> None:
    profiles = slot_profiles([(2, 16), (1, 64), (4, 16)], rows_per_slot=1)
    grid = of([(1, 4, 4), (1, 8, 8), (1, 2, 8), (1, 4, 4)])
    launches = plan_slots(grid, profiles, COSTS, way="equal")
    assert [launch.images for launch in launches] == [(0, 2, 3), (1,)]
    assert {launch.slot_patches for launch in launches} == {16, 64}
    with refused(InputError, "image 1", "40 patches", "140 x 56 pixels", 16, 64):
        plan_slots(of([(1, 4, 4), (1, 4, 10)]), profiles, COSTS, way="equal")


@pytest.mark.parametrize("way", ["uniform", "equal"])
def test_an_image_that_fits_no_slot(way: SlotWay) -> None:
    profiles = slot_profiles([(2, 256), (1, 4096)], rows_per_slot=2 if way == "uniform" else 1)
    facts = (4900, 1225, "980 x 980 pixels", 4096, 1024, "896 x 896 pixels")
    with refused(InputError, "image 1", *facts):
        plan_slots(of([(1, 16, 16), (1, 70, 70)]), profiles, COSTS, way=way)


@pytest.mark.parametrize(
    "profile",
    [
        Profile(min_patches=4, opt_patches=8, max_patches=16, max_images=4),
        Profile(min_patches=16, opt_patches=16, max_patches=16, min_images=3, max_images=3),
        Profile(min_patches=20, opt_patches=20, max_patches=20, min_images=4, max_images=4),
    ],
    ids=["no bucket", "half a slot", "slots of 10"],
)
def test_a_profile_that_has_no_slots(profile: Profile) -> None:
    with refused(ManifestError, "profile 0", profile.max_patches, profile.max_images):
        SlotPlanner([profile], COSTS)


def test_the_planner_of_an_engine() -> None:
    profiles = slot_profiles([(2, 16)])
    for way in ("uniform", "equal"):
        planner = planner_for_engine(EngineAttention(way=way), profiles, FULL)
        assert isinstance(planner, SlotPlanner)
        assert planner.largest_image == (16 if way == "uniform" else 8)
    packed = planner_for_engine(EngineAttention(way="packed"), profiles, FULL)
    assert isinstance(packed, LaunchPlanner)
    assert packed.largest_image == 32
    assert SlotPlanner([], COSTS).largest_image is None


def test_a_plan_is_made_once_for_a_grid() -> None:
    planner = SlotPlanner([], COSTS)
    grid = of([(1, 4, 4), (1, 2, 2), (1, 4, 4)])
    assert planner(grid) is planner(of(grid.tuples()))
    assert planner.layouts(grid) is planner.layouts(of(grid.tuples()))


def test_pieces_that_are_neighbours_in_batch_and_launch_are_one() -> None:
    pieces = [
        Piece(slice(0, 4), slice(0, 4)),
        Piece(slice(4, 8), slice(4, 8)),
        Piece(slice(8, 12), slice(12, 16)),
        Piece(slice(16, 20), slice(16, 20)),
    ]
    assert joined_pieces(pieces) == [Piece(slice(0, 8), slice(0, 8)), *pieces[2:]]


def test_a_whole_batch_is_not_copied() -> None:
    """Frames of a video, or one image: their patches are read in place."""
    pixels, rows = batch([(1, 4, 4)] * 3, HEAD_DIM_80)
    (layout,) = SlotPlanner([], COSTS).layouts(of(rows))
    assert np.shares_memory(layout.gathered(pixels), pixels)
    assert layout.rows.tolist() == [[1, 4, 4], [0, 2, 2]] * 3
