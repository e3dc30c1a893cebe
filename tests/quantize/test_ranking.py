"""Ranking: gradients through the graph, first-order losses, and the bound on whole graphs."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.quantize import search
from mmvision_export.quantize.backward import pulled_back, values_needed
from mmvision_export.quantize.evidence import losses
from mmvision_export.quantize.plan import Plan, plan_of
from mmvision_export.quantize.ranking import Ranker, Ranking, ranking_sample
from mmvision_export.quantize.search import MOST_EVALUATIONS, fewest_kept
from mmvision_export.quantize.statistics import run, values_of
from mmvision_export.quantize.units import units_of
from tests.support.configs import HEAD_DIM_80, copy_of

BATCH = sample_batch(((1, 4, 3), (2, 2, 2), (1, 1, 1)), HEAD_DIM_80, seed=5)


def _changed_output(graph: Path, product: str, change: np.ndarray) -> np.ndarray:
    """The output with something added to what a product gives."""
    model = ir.load(graph)
    (node,) = (each for each in model.graph if each.name == product)
    value = node.outputs[0]
    model.graph.inputs.append(
        added := ir.Value(name="added", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    )
    total = ir.node("Add", [value, added], name="changed")
    total.outputs[0].name = "changed"
    users = [(user, index) for user, index in value.uses() if user is not total]
    model.graph.insert_after(node, total)
    for user, index in users:
        user.replace_input_with(index, total.outputs[0])
    if model.graph.outputs[0] is value:
        model.graph.outputs[0] = total.outputs[0]
    from mmvision_export.quantize.statistics import _session

    session = _session(ir.serde.serialize_model(model).SerializeToString(), graph.parent)
    pixels, grid = BATCH
    result: np.ndarray = session.run(
        None, {"pixel_values": pixels, "grid_thw": grid, "added": change}
    )[0]
    return result


@pytest.mark.parametrize(
    "product",
    [
        "embeddings.patch_embedding",  # through every operator there is
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.v_proj",
        "layers.1.mlp.fc1",
        "patch_merge_mlp.linear_1",
        "patch_merge_mlp.linear_2",
    ],
)
def test_gradients_are_those_of_finite_differences(product: str, exported: Path) -> None:
    """`v . (f(x + h d) - f(x - h d)) / 2h`, for every kind of product.

    Central differences in float32 have an error of h^2 of the function's size and of 1e-7 / h: at
    h = 1e-2 both are below 1e-3. The control is the gradient of another scalar, which differs.
    """
    model = load_graph(exported / "model.onnx")
    output = str(model.graph.outputs[0].name)
    (values,) = values_of(exported / "model.onnx", [*values_needed(model), output], [BATCH])
    generator = np.random.default_rng(1)
    scalars = generator.standard_normal((2, *values[output].shape), np.float32)
    (gradients,) = (
        gradient
        for node, gradient, _ in pulled_back(model, values, scalars)
        if node.name == product
    )
    direction = generator.standard_normal(gradients.shape[1:], np.float32)
    step = 1e-2
    ahead, behind = (
        _changed_output(exported / "model.onnx", product, sign * step * direction).astype(float)
        for sign in (np.float32(1), np.float32(-1))
    )
    measured = ((ahead - behind) / (2 * step) * scalars).sum(axis=(1, 2))
    computed = (gradients.astype(float) * direction).sum(axis=(1, 2))
    size = np.linalg.norm(ahead - behind) / (2 * step)  # standard deviation of either scalar
    np.testing.assert_allclose(computed, measured, atol=5e-3 * size)
    assert abs(computed[0] - measured[1]) > 0.02 * size


@pytest.fixture(scope="module")
def plan(exported: Path) -> Plan:
    source = exported / "model.onnx"
    units = units_of(load_graph(source))
    return plan_of(source, source, units, "cpu-int8", [BATCH], "minmax", Progress())


def test_estimates_are_what_a_unit_costs_alone(plan: Plan, exported: Path) -> None:
    """Against the graph with that unit alone in 8 bit.

    The square of a random vector's part in one direction has a relative standard deviation of sqrt(2). Two
    vectors for each of 21 tokens leave sqrt(2 / 42) = 0.22. All estimates are within four of these of the
    mean loss, and their mean is within four of 0.22 / sqrt(13). The control is the loss of the next unit.
    """
    reference = run(plan.source, [BATCH], weights_in=exported, dtype=np.float32)[0]
    # Embeddings of which each token has lost as much, so that tokens have even weights.
    length = np.linalg.norm(reference, axis=1, keepdims=True)
    even = reference + 3 * length * _orthogonal(np.roll(reference, 1, axis=1), reference)
    ranking = Ranker(plan, [BATCH])([even], Progress())
    assert ranking.measured == pytest.approx([1 - 1 / math.sqrt(10)] * 3)
    measured = []
    for unit in plan.units:
        model = plan.model({other.name for other in plan.units} - {unit.name})
        content = ir.serde.serialize_model(model).SerializeToString()
        result = run(content, [BATCH], weights_in=exported, dtype=np.float32)[0]
        measured.append(losses(result, reference).mean())
    assert ranking.estimates.shape == (3, len(measured)) == (3, 13)
    estimated = np.average(ranking.estimates, axis=0, weights=[12, 8, 1])  # tokens of each image
    ratios = estimated / measured
    assert (abs(ratios - 1) < 0.87).all(), ratios
    assert abs(ratios.mean() - 1) < 0.24
    assert (abs(estimated / np.roll(measured, 1) - 1) > 0.87).any()


def test_a_small_error_is_explained_in_its_own_direction(plan: Plan, exported: Path) -> None:
    """However large it is. The controls: another direction, and an error too large to explain."""
    reference = run(plan.source, [BATCH], weights_in=exported, dtype=np.float32)[0]
    length = np.linalg.norm(reference, axis=1, keepdims=True)

    def estimates(turns: int, size: float) -> np.ndarray:
        error = length * _orthogonal(np.roll(reference, turns, axis=1), reference)
        ranking = Ranker(plan, [BATCH])([reference + np.float32(size) * error], Progress())
        # 1 - cos of a right angle's tangent
        assert ranking.measured == pytest.approx([1 - 1 / math.hypot(1, size)] * 3, rel=1e-3)
        return ranking.estimates

    small = estimates(1, 0.01)
    # A chord leans towards the token by half its length: (0.1 / 2)^2 of its square.
    np.testing.assert_allclose(estimates(1, 0.1), small, rtol=3e-3)
    assert (abs(estimates(2, 0.01) / small - 1) > 0.1).mean() > 0.5
    # Of 96 channels a direction has one; a random vector has all of them.
    assert estimates(1, 1).sum() > 10 * small.sum()


def test_shares_add_up_to_what_was_measured() -> None:
    """Of images that lose little. Of others the estimates stand."""
    ranking = Ranking(np.array([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]]), np.array([0.01, 0.4]))
    shares = ranking.losses(np.array([True, False, True]))
    np.testing.assert_allclose(shares, [[0.0025, 0.005, 0.0075], [0.1, 0.2, 0.3]])


def _orthogonal(rows: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Unit rows, orthogonal to others."""
    unit = to / np.linalg.norm(to, axis=1, keepdims=True)
    rows = rows - unit * (rows * unit).sum(axis=1, keepdims=True)
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def test_a_ranking_lets_go_of_the_weights(plan: Plan, exported: Path, tmp_path: Path) -> None:
    """They are 3.5 GB at full size. The control is a ranking without the collector, which leaves them mapped."""
    directory = copy_of(exported, tmp_path / "m")
    plan = dataclasses.replace(plan, source=directory / "model.onnx")

    def is_mapped() -> bool:
        return str(directory / "model.onnx.data") in Path("/proc/self/maps").read_text()

    results = [np.ones((21, HEAD_DIM_80.text_hidden_size), np.float32)]
    ranker = Ranker(plan, [BATCH])
    gc.collect()
    gc.disable()
    try:
        vars(Ranker)["_ranked"](ranker, [0], results, Progress())
        assert is_mapped()
        ranker(results, Progress())
        assert not is_mapped()
    finally:
        gc.enable()


def test_the_sample_is_cut_and_bounded() -> None:
    config = HEAD_DIM_80
    large = sample_batch(((1, 20, 20),), config, seed=1)  # 1600 patches
    video = sample_batch(((4, 6, 6),), config, seed=2)  # 4 x 144
    tiny = sample_batch(((1, 1, 1),) * 9, config, seed=3)
    sample = ranking_sample([tiny, video, large, *[large] * 9], config)
    for pixels, grid in sample:
        assert len(pixels) == grid.prod(axis=1).sum() <= 256
        assert (grid[:, 1:] % config.spatial_merge_size == 0).all()
    assert 2048 <= sum(len(pixels) for pixels, _ in sample) < 2048 + 256
    # The large image's middle block rows: 6 rows of patches of 40, as many above as below but one.
    pixels, grid = sample[2]
    assert grid.tolist() == [[1, 6, 40]]
    np.testing.assert_array_equal(pixels, large[0][8 * 80 : 8 * 80 + 240])


def _search(
    lost: Callable[[frozenset[str]], float],
    estimates: Mapping[str, float],
    again: Mapping[str, float] | None = None,
    allowed: float = 1e-3,
) -> frozenset[str] | None:
    """What is kept; `again` is what each further ranking says."""
    asked: list[frozenset[str]] = [frozenset()]

    def loss_of(keep: frozenset[str]) -> float:
        asked.append(keep)
        return lost(keep)

    def ranked(by: Mapping[str, float]) -> Ranking:
        return Ranking(np.array([[*by.values()]]), np.array([lost(asked[-1])]))

    kept = fewest_kept(
        loss_of,
        lambda: ranked(again or estimates),
        [*estimates],
        ranked(estimates),
        allowed=allowed,
    )
    assert len(asked) == len(set(asked)) <= MOST_EVALUATIONS
    assert kept is None or (kept in asked and lost(kept) <= allowed)
    return kept


@pytest.mark.parametrize("units", [2, 21, 133, 260])
@pytest.mark.parametrize("worst_to_mean", [0.5, 4.0, 60.0])
def test_the_search_finds_the_fewest_within_its_bound(units: int, worst_to_mean: float) -> None:
    """Whatever the ratio of the worst token to the estimate is."""
    estimates = {f"unit {index}": 1e-2 * 0.9**index for index in range(units)}

    def lost(keep: frozenset[str]) -> float:
        return worst_to_mean * sum(each for name, each in estimates.items() if name not in keep)

    kept = _search(lost, estimates)
    fewest = next(
        number for number in range(units + 1) if lost(frozenset([*estimates][:number])) <= 1e-3
    )
    assert kept == frozenset([*estimates][:fewest])


def test_a_graph_that_failed_says_which_tokens_are_left() -> None:
    """Two tokens and the units that cost each: the first ranking sees one of them.

    The control is a search that is told of the first token only. It keeps units of the first token until it
    comes to those of the second.
    """
    first = {f"a{index}": 1e-3 for index in range(20)} | {f"b{index}": 1e-9 for index in range(20)}
    second = {name: 1e-3 if name[0] == "b" else 1e-9 for name in first}

    def lost(keep: frozenset[str]) -> float:
        tokens = (first, second)
        return max(sum(each[name] for name in each if name not in keep) for each in tokens)

    kept = _search(lost, first, second, allowed=5.5e-3)
    assert kept is not None
    assert sorted(name[0] for name in kept) == ["a"] * 15 + ["b"] * 15
    misled = _search(lost, first, first, allowed=5.5e-3)
    assert misled is not None
    assert len(misled) >= 35


def test_a_loss_that_grows_faster_than_estimates_does_not_use_up_the_graphs() -> None:
    """It grows with their fourth power: a graph that failed says 'one less than what passed'.

    By the demands alone the search asked for 70, 30, 69, 31, 68, 32, 67, 33 and 66 units.
    """
    estimates = {f"unit {index}": 3e-4 * 0.95**index for index in range(133)}

    def lost(keep: frozenset[str]) -> float:
        mean = sum(each for name, each in estimates.items() if name not in keep)
        return mean / 2 * (1 + (mean / 5e-4) ** 3)

    fewest = next(
        number for number in range(133) if lost(frozenset([*estimates][:number])) <= 1e-3 / 1.5
    )
    kept = _search(lost, estimates, allowed=1e-3 / 1.5)
    assert kept is not None
    assert len(kept) <= fewest + 1


def test_a_misleading_estimate_costs_no_more_evaluations() -> None:
    """The estimate says that the first units are all; the last one is."""
    estimates = {f"unit {index}": 1.0 / (1 + index) ** 4 for index in range(133)}

    def lost(keep: frozenset[str]) -> float:
        return 1e-4 if len(keep) >= 132 else math.inf

    kept = _search(lost, estimates)
    assert kept is not None
    assert len(kept) >= 132


def test_nothing_passes() -> None:
    estimates = {f"unit {index}": 1e-3 for index in range(21)}
    assert _search(lambda _: 0.5, estimates) is None
    assert _search(lambda _: math.inf, dict.fromkeys(estimates, 0.0)) is None


def test_the_bound_is_for_whole_graphs(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions are counted: of the graphs that are written, and of the float32 graph."""
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.quantize import statistics
    from mmvision_export.quantize.quantize import quantize

    opened: list[Any] = []
    create = vars(statistics)["create_session"]

    def counted(graph: Any, **options: Any) -> Any:
        opened.append(graph)
        return create(graph, **options)

    monkeypatch.setattr(statistics, "create_session", counted)
    directory = copy_of(exported, tmp_path / "m")
    report = quantize(
        directory,
        Manifest.read(directory),
        "int8",
        calibration=[BATCH],
        held_out=[sample_batch(((1, 3, 3),), HEAD_DIM_80, seed=9)],
        min_cosine=0.9995,
    )
    assert report.kept  # so that it was searched for
    written = [graph for graph in opened if isinstance(graph, Path) and graph.name != "model.onnx"]
    assert len(written) == report.evaluations
    assert 1 < report.evaluations <= search.MOST_EVALUATIONS
    # Two to calibrate and one for the references; then one for each ranking, after a graph that failed.
    assert len(opened) - len(written) <= 3 + report.evaluations
