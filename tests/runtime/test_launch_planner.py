"""Padding and splitting: what they do to the numbers (nothing), and which launches are chosen."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvision_export.artifacts.profile import Profile, profiles_from_buckets
from mmvision_export.core.errors import EngineError, InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import FLOOR_PATCHES, Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.runtime.launch_planner import (
    ANY_SIZE,
    Launch,
    LaunchPlanner,
    fitting_grid,
    padding_rows,
    plan_launches,
)
from tests.support.configs import HEAD_DIM_80, batch, grids, relative_l2, run_graph
from tests.support.errors import refused

Grid = list[tuple[int, int, int]]
FULL = EncoderConfig()


def of(rows: Any) -> PackedGrid:
    return PackedGrid(np.array(rows, dtype=np.int64), FULL.patches_per_token)


def padded(pixels: np.ndarray, rows: np.ndarray, profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """A batch as a bucket's launch sees it."""
    more = padding_rows(len(pixels), len(rows), profile, HEAD_DIM_80)
    zeros = np.zeros((int(more.prod(axis=1).sum()), pixels.shape[1]), pixels.dtype)
    return np.concatenate([pixels, zeros]), np.concatenate([rows, more])


@settings(max_examples=25)
@given(grid=grids(), seed=st.integers(0, 99), spare=st.sampled_from([0, 1, 2, 7, 64]))
def test_padding_changes_nothing(exported: Path, grid: Grid, seed: int, spare: int) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80, seed)
    (profile,) = profiles_from_buckets([len(pixels) + 4 * spare], [len(grid) + 3], HEAD_DIM_80)
    if not profile.takes(len(pixels), len(rows)):
        profile = dataclasses.replace(profile, max_images=len(grid) + 1, min_images=len(grid) + 1)
    more_pixels, more_rows = padded(pixels, rows, profile)
    assert (len(more_pixels), len(more_rows)) == (profile.max_patches, profile.max_images)
    graph = exported / "model.onnx"
    tokens = run_graph(graph, more_pixels, more_rows)
    # The two differ by the order of sums in ONNX Runtime's matrix products, which depends on their
    # number of rows.
    assert relative_l2(tokens[: len(pixels) // 4], run_graph(graph, pixels, rows)) <= 1e-6
    assert np.isfinite(tokens).all()


def test_padding_that_is_no_segment_of_its_own_is_noticed(exported: Path) -> None:
    """The control of the test above: patches counted as the last image's change it."""
    pixels, rows = batch([(1, 4, 6), (1, 2, 4)], HEAD_DIM_80)
    wrong = np.array([(1, 4, 6), (1, 2, 12)])
    tokens = run_graph(
        exported / "model.onnx", np.concatenate([pixels, np.zeros((16, 1176), np.float32)]), wrong
    )
    assert relative_l2(tokens[:8], run_graph(exported / "model.onnx", pixels, rows)) > 1e-3


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_the_padding_is_a_valid_grid(merge: int) -> None:
    config = dataclasses.replace(HEAD_DIM_80, spatial_merge_size=merge)
    (profile,) = profiles_from_buckets([40 * merge**2], [5], config)
    rows = padding_rows(7 * merge**2, 3, profile, config)
    np.testing.assert_array_equal(
        rows, [(1, merge, 33 * merge), (0, merge, merge), (0, merge, merge)]
    )
    assert len(padding_rows(40 * merge**2, 6, profile, config)) == 0
    assert (
        len(
            padding_rows(
                4, 1, Profile(min_patches=4, opt_patches=8, max_patches=16, max_images=4), config
            )
        )
        == 0
    )


def test_buckets_become_profiles() -> None:
    small, large = profiles_from_buckets([1024, 16], [64], FULL)
    assert small == Profile(
        min_patches=16, opt_patches=16, max_patches=16, min_images=4, max_images=4
    )
    assert large == Profile(
        min_patches=1024, opt_patches=1024, max_patches=1024, min_images=65, max_images=65
    )
    assert small.is_bucket
    assert small.takes(16, 4)
    assert small.takes(12, 3)
    assert not small.takes(12, 4)  # no row left for the padding
    assert not small.takes(20, 1)


@pytest.mark.parametrize(
    ("buckets", "facts"),
    [
        ([], ["bucket"]),
        ([0], [4, 0]),
        ([256, 1022], [4, 1022]),
        ([256, 256], ["256, 256"]),
    ],
)
def test_bad_buckets(buckets: list[int], facts: list[object]) -> None:
    with refused(EngineError, *facts):
        profiles_from_buckets(buckets, [8], FULL)


@pytest.mark.parametrize(("images", "facts"), [([], ["[]"]), ([0, 8], [0, 8]), ([8, 8], ["8, 8"])])
def test_bad_numbers_of_images(images: list[int], facts: list[object]) -> None:
    with refused(EngineError, *facts):
        profiles_from_buckets([256], images, FULL)


def test_a_bucket_for_few_images_and_one_for_many() -> None:
    profiles = profiles_from_buckets([256, 16], [64, 2], FULL)
    sizes = [(profile.max_patches, profile.max_images) for profile in profiles]
    # 16 patches are at most 4 images.
    assert sizes == [(16, 3), (16, 4), (256, 3), (256, 64)]
    of_one = [(1, 2, 4)]
    for grid, expected in ((of_one, 0), (of_one * 2, 0), ([(1, 2, 2)] * 4, 1), (of_one * 3, 3)):
        # Whatever their order in the engine, the fewest rows that do are taken.
        for order in (profiles, profiles[::-1]):
            (launch,) = plan_launches(of(grid), order, Costs(FULL, masked=False))
            assert order[launch.profile] == profiles[expected]


def test_costs_are_those_of_the_full_size() -> None:
    """Known counts of the released encoder, in TFLOP."""
    packed, masked = Costs(FULL, masked=False), Costs(FULL, masked=True)
    assert packed.of(2304, 2304**2) == pytest.approx(4.2e12, rel=0.02)
    assert packed.of(4096, 4096**2) == pytest.approx(8.7e12, rel=0.02)
    assert packed.of(4 * 4096, 4 * 4096**2) == pytest.approx(34.7e12, rel=0.02)
    assert masked.of(4 * 4096, 4 * 4096**2) == pytest.approx(67.7e12, rel=0.02)


def images(launches: list[Launch]) -> list[int]:
    return [launch.images.stop - launch.images.start for launch in launches]


WIDE = Profile(min_patches=4, opt_patches=1024, max_patches=100_000, max_images=64)


def test_masked_attention_is_cut_where_that_is_cheaper() -> None:
    large = np.array([(1, 32, 32)] * 4)
    assert images(plan_launches(of(large), [WIDE], Costs(FULL, masked=False))) == [4]
    assert images(plan_launches(of(large), [WIDE], Costs(FULL, masked=True))) == [1, 1, 1, 1]
    # Many small ones cost less together: each launch costs at least what reading the weights does.
    small = np.array([(1, 4, 4)] * 16)
    assert FLOOR_PATCHES == 16 * 16
    assert images(plan_launches(of(small), [WIDE], Costs(FULL, masked=True))) == [16]


@given(grid=grids(max_images=8))
def test_a_graph_without_profiles_is_cut_as_if_every_cut_were_tried(grid: Grid) -> None:
    """The planner looks back no further than a best cut can reach.

    That must not change what is best.
    """
    costs = Costs(FULL, masked=True)
    counts = of(grid).patches_per_image

    def cost(cut: tuple[int, ...]) -> int:
        parts = [counts[a:b] for a, b in itertools.pairwise(cut)]
        return sum(costs.of(sum(part), sum(n * n for n in part)) for part in parts)

    inner = range(1, len(grid))
    cuts = [
        (0, *chosen, len(grid))
        for size in range(len(grid))
        for chosen in itertools.combinations(inner, size)
    ]
    launches = plan_launches(of(grid), [ANY_SIZE], costs)
    found = (0, *(launch.images.stop for launch in launches))
    assert cost(found) == min(cost(cut) for cut in cuts)
    assert LaunchPlanner([], costs)(of(grid)) == tuple(launches)


def test_the_smallest_bucket_that_takes_it() -> None:
    profiles = profiles_from_buckets([1024, 256, 4096], [64], FULL)
    for patches, expected in ((4, 0), (256, 0), (260, 1), (1024, 1), (1028, 2)):
        (launch,) = plan_launches(of([(1, 2, patches // 2)]), profiles, Costs(FULL, masked=False))
        assert launch.profile == expected


@st.composite
def plans(draw: st.DrawFn) -> tuple[Grid, list[Profile], Costs]:
    grid = draw(grids(max_images=5))
    largest = max(t * h * w for t, h, w in grid)
    buckets = draw(st.sets(st.integers(1, 50).map(lambda n: 4 * n), min_size=1, max_size=3)) | {
        4 * (largest // 4 + 1)
    }
    images = st.sets(st.integers(1, 4), min_size=1, max_size=2)
    profiles = profiles_from_buckets(sorted(buckets), sorted(draw(images)), HEAD_DIM_80)
    return grid, profiles, Costs(HEAD_DIM_80, masked=draw(st.booleans()))


@given(plans())
def test_a_plan_covers_every_image_once_and_no_other_is_cheaper(
    plan: tuple[Grid, list[Profile], Costs],
) -> None:
    grid, profiles, costs = plan
    rows = np.array(grid)
    launches = plan_launches(of(rows), profiles, costs)
    assert [i for launch in launches for i in range(len(rows))[launch.images]] == list(
        range(len(rows))
    )
    total = int(rows.prod(axis=1).sum())
    assert [i for launch in launches for i in range(total)[launch.patches]] == list(range(total))

    def cost(start: int, end: int) -> float:
        counts = rows[start:end].prod(axis=1).tolist()
        fitting = [p for p in profiles if p.takes(sum(counts), len(counts))]
        options = ([*counts, p.max_patches - sum(counts)] for p in fitting)
        return min((costs.of(sum(o), sum(n * n for n in o)) for o in options), default=float("inf"))

    def of_cuts(cuts: tuple[int, ...]) -> float:
        return sum(cost(*pair) for pair in itertools.pairwise((0, *cuts, len(rows))))

    inner = range(1, len(rows))
    every = [cuts for size in range(len(rows)) for cuts in itertools.combinations(inner, size)]
    assert of_cuts(tuple(launch.images.start for launch in launches[1:])) == min(
        map(of_cuts, every)
    )


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ((1, 70, 70), [4900, 1225, "980 x 980 pixels", 4096, 1024, "896 x 896 pixels"]),
        ((4, 40, 32), [5120, 1280, "4 x 448 x 560 pixels", 4096, 1024, "392 x 476 pixels"]),
    ],
)
def test_too_large_images_are_refused_with_numbers(
    row: tuple[int, int, int], facts: list[object]
) -> None:
    profiles = profiles_from_buckets([256, 4096], [64], FULL)
    with refused(InputError, "image 1", *facts):
        plan_launches(of([(1, 2, 2), row]), profiles, Costs(FULL, masked=False))


def test_a_profile_too_small_for_its_frames() -> None:
    with refused(InputError, "4 temporal patches"):
        plan_launches(
            of([(4, 2, 2)]), profiles_from_buckets([8], [1], FULL), Costs(FULL, masked=False)
        )


def test_batches_below_the_least_size_are_refused() -> None:
    profiles = [Profile(min_patches=64, opt_patches=64, max_patches=256, max_images=4)]
    with refused(InputError, 64, 256):
        plan_launches(of([(1, 2, 2)]), profiles, Costs(FULL, masked=False))


@given(st.integers(1, 4), st.integers(1, 200), st.integers(1, 200), st.integers(1, 2000))
def test_the_size_that_would_fit_fits(t: int, h: int, w: int, tokens: int) -> None:
    rows, columns = fitting_grid(t, 2 * h, 2 * w, 4 * tokens, FULL)
    assert t * rows * columns <= 4 * tokens
    assert rows % 2 == columns % 2 == 0
    if t <= tokens:
        # At least a quarter of the room is used, or a longer side would be more than the image's
        # own.
        assert (
            t * rows * columns * 4 >= min(4 * tokens, t * 4 * h * w) - 16 * t
            or min(rows, columns) == 2
        )


def test_random_batches_equal_runs_of_one_image(exported: Path) -> None:
    """Splitting: what each launch gives, put back in order, is what each image gives alone."""
    generator = np.random.default_rng(0)
    graph, rest = exported / "model.onnx", 0
    profiles = profiles_from_buckets([64, 128], [3], HEAD_DIM_80)
    for _ in range(5):
        grid = [
            (int(t), 2 * int(h), 2 * int(w))
            for t, h, w in generator.integers(1, 5, (int(generator.integers(2, 9)), 3))
        ]
        grid = [(t, h, w) if t * h * w <= 128 else (1, h, w) for t, h, w in grid]
        pixels, rows = batch(grid, HEAD_DIM_80, seed=rest)
        launches = plan_launches(of(rows), profiles, Costs(HEAD_DIM_80, masked=True))
        rest += len(launches) > 1
        pieces: list[Any] = []
        for launch in launches:
            run = run_graph(
                graph,
                *padded(pixels[launch.patches], rows[launch.images], profiles[launch.profile]),
            )
            pieces.append(run[: (launch.patches.stop - launch.patches.start) // 4])
        whole = run_graph(graph, pixels, rows)
        assert relative_l2(np.concatenate(pieces), whole) <= 1e-6
    assert rest


def test_a_plan_is_made_once_for_a_grid_and_anew_for_another() -> None:
    profiles = profiles_from_buckets([16, 64], [4], FULL)
    costs = Costs(FULL, masked=False)
    planner = LaunchPlanner(profiles, costs)
    first, second = of([(1, 4, 4)] * 5), of([(1, 8, 8), (1, 2, 2)])
    assert planner(first) is planner(of(first.tuples()))
    for grid in (first, second, first):
        assert list(planner(grid)) == plan_launches(grid, profiles, costs)
    assert planner(first) != planner(second)


def test_a_refused_grid_is_refused_again() -> None:
    planner = LaunchPlanner(profiles_from_buckets([16], [1], FULL), Costs(FULL, masked=False))
    for _ in range(2):
        with refused(InputError, 64, 16):
            planner(of([(1, 8, 8)]))


def test_a_profile_of_several_images_takes_launches_that_cost_would_cut() -> None:
    """Cutting is free only where a launch of one image is allowed."""
    grid, costs = of([(1, 24, 24)] * 3), Costs(FULL, masked=True)
    several = Profile(min_patches=4, opt_patches=64, max_patches=4096, min_images=3, max_images=8)
    assert images(plan_launches(grid, [several], costs)) == [3]
    alone = dataclasses.replace(several, min_images=1)
    assert images(plan_launches(grid, [alone], costs)) == [1, 1, 1]
