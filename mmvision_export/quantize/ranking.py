"""Which units cost the most accuracy, from one run of the float32 graph.

What an error in a unit's product does to the output is, to first order, `J d`, with `J` the Jacobian of the
output by the product. For a vector `z` of the output's size `z . J d = (J^T z) . d`, and `J^T z` of every
product comes out of one walk back through the graph. So a few vectors rank all units, where measuring each
takes a run of the graph for each.

The errors of single values are taken as independent of one another. With `g = J^T z`, of a row `x` and weights
`W` of the product:

    E[(z . J d)^2] = sum_i (W^T g)_i^2 e_i^2 + |x|^2 sum_o g_o^2 m_o

`e_i` is what 8 bits change in a value of the row, and `m_o` is the mean square of what 8 bits change in the
weights of an output channel. A sum over hundreds of values is far less random than one square of their sum.

Of a token's error only what is orthogonal to the token changes its cosine, `1 - cos = |e|^2 / (2 |token|^2)`.
Where a graph failed by a little, `z` is the direction of the token's own error in that graph, and the
estimates are shares of the loss that was measured. Where a graph failed by much, that direction says nothing
of small errors, and `z` is a random vector of independent unit normals: `E[(z . J d)^2] = |J d|^2`.

A gate asks for the worst tokens. With massive activations, a few tokens are far worse than the others: the
neurons that write these activations nearly fire for such a token, or barely fire. So each image has
estimates of its own, in which a token's weight is the third power of its loss in a graph that failed.

References:
    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix", Communications
    in Statistics 19(2), for the random vectors.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.quantize.backward import pulled_back, values_needed
from mmvision_export.quantize.evidence import losses
from mmvision_export.quantize.plan import Plan, weights_of
from mmvision_export.quantize.statistics import Batch, values_of

__all__ = [
    "LINEAR",
    "RANKING_PATCHES",
    "Ranker",
    "Ranking",
    "ranking_sample",
]

Array = npt.NDArray[np.float32]
Losses = npt.NDArray[np.float64]

RANKING_PATCHES = 2048
BATCH_PATCHES = 256  # all values of a batch are held: 0.7 GB at full size
PROBES = 2
SHARPNESS = 3
LINEAR = 0.05
"""Of a cosine: from a larger loss nothing follows about small ones."""

_TINY = np.finfo(np.float32).tiny


def ranking_sample(batches: Sequence[Batch], config: EncoderConfig) -> list[Batch]:
    """Some of the images in small batches; of what is large, the middle.

    Args:
        batches: Of any number of images each.
        config: The encoder's dimensions.

    Returns:
        Batches of at most `BATCH_PATCHES`, or of one image; no more images once they have
        `RANKING_PATCHES`.
    """
    taken: list[Batch] = []
    patches = 0
    for pixels, grid in batches:
        starts = np.concatenate([[0], np.cumsum(grid.prod(axis=1))])
        for start, row in zip(starts, grid, strict=False):
            first, cut = _cut(row, config.spatial_merge_size)
            size = int(cut.prod())
            part = pixels[start + first : start + first + size]
            if taken and len(taken[-1][0]) + size <= BATCH_PATCHES:
                before = taken.pop()
                taken.append(
                    (np.concatenate([before[0], part]), np.concatenate([before[1], cut[None]]))
                )
            else:
                taken.append((part, cut[None]))
            patches += size
            if patches >= RANKING_PATCHES:
                return taken
    return taken


def _cut(row: npt.NDArray[np.int64], merge: int) -> tuple[int, npt.NDArray[np.int64]]:
    """First patch and grid row of the middle of an image: whole frames, or block rows of one."""
    t, h, w = map(int, row)
    if t * h * w <= BATCH_PATCHES:
        return 0, row
    if h * w <= BATCH_PATCHES:
        return 0, np.array([BATCH_PATCHES // (h * w), h, w], np.int64)
    # Patches are in the order of block rows, so that consecutive block rows are consecutive patches.
    blocks = max(1, BATCH_PATCHES // (merge * w))
    above = (h // merge - blocks) // 2
    return above * merge * w, np.array([1, blocks * merge, w], np.int64)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What units cost the worst tokens of some images.

    Attributes:
        estimates: What quantising each unit alone takes from the cosine of an image's worst tokens, to first
            order, `[images, units]`. Where `measured` is below `LINEAR`, up to a factor for each image.
        measured: What the worst token of each image loses in the graph that has to become better, `[images]`.
    """

    estimates: npt.NDArray[np.float64]
    measured: npt.NDArray[np.float64]

    @property
    def is_linear(self) -> npt.NDArray[np.bool_]:
        """Whether an image loses so little that estimates are shares of that, `[images]`."""
        return self.measured < LINEAR

    def losses(self, quantized: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """What each unit adds to the loss of an image's worst tokens, `[images, units]`.

        Args:
            quantized: Which units are in the graph that has to become better, `[units]`: theirs
                add up to what was measured.
        """
        totals = self.estimates[:, quantized].sum(axis=1)
        is_share = self.is_linear & (totals > 0)
        ratios = np.divide(self.measured, totals, out=np.ones_like(totals), where=is_share)
        shares: npt.NDArray[np.float64] = self.estimates * ratios[:, None]
        return shares


class Ranker:
    """Ranks units for the tokens that are worst in a graph.

    Args:
        plan: How units are quantised.
        sample: See `ranking_sample`.
    """

    def __init__(self, plan: Plan, sample: Sequence[Batch]) -> None:
        self._plan = plan
        self._sample = sample
        self._of_weights: dict[str, Array] = {}
        self._tokens: dict[int, Array] = {}  # of the float32 graph, by batch
        self._rankings = 0

    def __call__(self, results: Sequence[Array], progress: Progress) -> Ranking:
        """What quantising each unit alone takes from the worst tokens of each image.

        The first ranking is on the whole sample, a further one on the third of its batches that lose the most.

        Args:
            results: The embeddings of each batch in the graph that has to become better, `[tokens, channels]`.
            progress: Told about each batch.
        """
        chosen = list(range(len(self._sample)))
        if self._tokens:
            chosen.sort(key=lambda i: -float(losses(results[i], self._tokens[i]).max()))
            chosen = chosen[: -(-len(chosen) // 3)]
        ranking = self._ranked(chosen, results, progress)
        self._rankings += 1
        # The parts of a graph refer to one another, so that only the collector lets go of it and of its
        # mapped weights: 3.5 GB for each ranking at full size.
        gc.collect()
        return ranking

    def _ranked(
        self, chosen: Sequence[int], results: Sequence[Array], progress: Progress
    ) -> Ranking:
        plan = self._plan
        model = load_graph(plan.source)
        self._of_weights = self._of_weights or _weight_errors(plan, model)
        output = str(model.graph.outputs[0].name)
        names = [*values_needed(model), output]
        # Rankings with different seeds have independent errors.
        generator = np.random.default_rng(self._rankings)
        estimates, measured = [], []
        progress.step("ranking units", total=len(chosen))
        batches = [self._sample[index] for index in chosen]
        for index, values in zip(chosen, values_of(plan.source, names, batches), strict=True):
            patches = values["grid_thw"].prod(axis=1)
            # A copy: one array of ONNX Runtime's keeps the memory of its whole session.
            self._tokens[index] = tokens = np.array(values[output], np.float32)
            lost = losses(results[index], tokens)
            starts = _first_rows(patches, len(tokens))
            probes = _probes(tokens, results[index], lost, starts, generator)
            squares = _squares(plan, self._of_weights, model, values, probes)
            table = [
                np.add.reduceat(squares[unit.name], _first_rows(patches, len(squares[unit.name])))
                for unit in plan.units
            ]
            estimates.append(np.stack(table, axis=1) / 2)
            measured.append(np.maximum.reduceat(lost, starts))
            progress.advance()
        return Ranking(np.concatenate(estimates), np.concatenate(measured))


def _weight_errors(plan: Plan, model: ir.Model) -> dict[str, Array]:
    """Mean square of what 8 bits change in the weights of each output channel, `[out]`, by a product's name.

    The weights are balanced, as they are when they are rounded.
    """
    found = {}
    for unit in plan.units:
        weights = weights_of(model, unit)
        for linear in unit.linears:
            weight = weights[linear.weight] * plan.divisors.get(unit.input, np.float32(1))
            found[linear.name] = ((plan.kind.rounded_weight(weight) - weight) ** 2).mean(axis=1)
    return found


def _first_rows(patches: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64]:
    """Of each image, where there is a row for each patch or for each token."""
    starts = np.concatenate([[0], patches.cumsum()[:-1]])
    first: npt.NDArray[np.int64] = starts * rows // patches.sum()
    return first


def _squares(
    plan: Plan,
    of_weights: Mapping[str, Array],
    model: ir.Model,
    values: Mapping[str, npt.NDArray[np.generic]],
    probes: Array,
) -> dict[str, npt.NDArray[np.float64]]:
    """`E[(z . J d)^2]` of each row that a unit reads, on the mean of the probes, by the unit's name."""
    unit_of = {linear.name: unit for unit in plan.units for linear in unit.linears}
    at_input: dict[str, list[Array]] = {unit.name: [] for unit in plan.units}
    from_weights: dict[str, list[Array]] = {unit.name: [] for unit in plan.units}
    found = {}
    for node, at_product, at_rows in pulled_back(model, values, probes):
        unit = unit_of[str(node.name)]
        at_input[unit.name].append(at_rows)
        from_weights[unit.name].append((at_product**2).mean(axis=0) @ of_weights[str(node.name)])
        if len(at_input[unit.name]) < len(unit.linears):
            continue
        divisor = plan.divisors.get(unit.input, np.float32(1))
        rows = values[unit.input].astype(np.float32, copy=False) / divisor
        changed = plan.rounding(unit)(rows) - rows
        # q, k and v are of one unit: the errors of what they read meet at the output.
        cotangent = sum(at_input.pop(unit.name)) * divisor
        each = ((cotangent * changed) ** 2).sum(axis=-1).mean(axis=0)
        each += sum(from_weights.pop(unit.name)) * (rows**2).sum(axis=1)
        found[unit.name] = each.astype(np.float64)
    return found


def _probes(
    tokens: Array,
    results: Array,
    lost: Losses,
    starts: npt.NDArray[np.int64],
    generator: np.random.Generator,
) -> Array:
    """Vectors `[PROBES, tokens, channels]`, orthogonal to each token and over its length.

    Args:
        tokens: `[tokens, channels]`.
        results: The same in the graph that has to become better.
        lost: Of each token.
        starts: First token of each image.
        generator: Of the random vectors and of signs. Signs keep the tokens of one image apart: they meet
            in attention.
    """
    length = np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), _TINY)
    directions = tokens / length
    probes = generator.standard_normal((PROBES, *tokens.shape), np.float32)
    worst = np.repeat(np.maximum.reduceat(lost, starts), np.diff([*starts, len(lost)]))
    near = worst < LINEAR
    error = _unit(_unit(results[near]) - directions[near])
    probes[:, near] = error * np.sign(probes[:, near, :1])
    probes -= directions * (probes * directions).sum(axis=-1, keepdims=True)
    weight = np.concatenate([_shares(each) for each in np.split(lost, starts[1:])])
    scaled: Array = (probes * (np.sqrt(weight)[:, None] / length)).astype(np.float32)
    return scaled


def _unit(rows: Array) -> Array:
    divided: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
    return divided


def _shares(lost: Losses) -> Losses:
    # A cosine cannot be further below 1 than 2; a token that is not finite counts like that.
    share: Losses = np.minimum(lost, 2.0) ** SHARPNESS
    total = share.sum()
    return share / total if total > 0 else np.full(len(lost), 1 / len(lost))
