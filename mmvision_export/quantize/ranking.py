"""Which units cost the most accuracy, from one run of the float32 graph.

The error that 8 bits make in a unit's product, `d`, is computed from what the unit reads. What it
does to the output is, to first order, `J d`, with `J` the Jacobian of the output by the product.
For a random vector `z` of independent unit normals `E[(z . J d)^2] = |J d|^2`, and `z . J d = (J^T z) .
d`, where `J^T z` of every product comes out of one walk back through the graph. So a few random
vectors rank all units, where measuring each takes a run of the graph for each.

Rows of a product are rounded apart from one another. So the error is taken row by row, `E[(z . J
d)^2] = sum over rows n of (J^T z)_n . d_n` squared: a sum over hundreds of rows is far less random
than the one square of their sum. What rows have in common, the rounding of the weights, is left out where it
adds up. Over the 133 units of a 32-layer encoder the two differed by a factor of 0.5 to 2.1, on the mean
1.05.

Of a token's error only what is orthogonal to the token changes its cosine, `1 - cos = |e|^2 / (2
|token|^2)`. A gate asks for the worst tokens: a token's weight is the third power of its loss in a graph
that failed.

References:
    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix", Communications
    in Statistics 19(2), for the random vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.progress import Progress
from mmvision_export.graph.load import load_graph
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.quantize.backward import pulled_back, values_needed
from mmvision_export.quantize.formats import scale_from_magnitude
from mmvision_export.quantize.plan import Plan
from mmvision_export.quantize.statistics import Batch, values_of
from mmvision_export.quantize.units import Linear, Unit

__all__ = ["RANKING_PATCHES", "cosine_lost", "ranking_sample", "worst_half"]

Array = npt.NDArray[np.float32]
Losses = npt.NDArray[np.float64]

RANKING_PATCHES = 1024
BATCH_PATCHES = 256  # all values of a batch are held: 0.7 GB at full size
# The square of one row and one vector has a relative standard deviation of sqrt(2). Three vectors and a
# hundred rows of a batch leave 0.08.
PROBES = 3
SHARPNESS = 3


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


def worst_half(
    sample: Sequence[Batch], losses: Sequence[Losses]
) -> tuple[list[Batch], list[Losses]]:
    """The batches of a sample with the worst tokens, half of them, and what their tokens lose."""
    order = sorted(range(len(sample)), key=lambda index: -float(losses[index].max()))
    taken = order[: -(-len(sample) // 2)]
    return [sample[index] for index in taken], [losses[index] for index in taken]


def cosine_lost(
    plan: Plan,
    sample: Sequence[Batch],
    losses: Sequence[Losses],
    progress: Progress,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """What quantising each unit alone takes from a token's cosine, to first order.

    Args:
        plan: How units are quantised.
        sample: See `ranking_sample`.
        losses: For each batch, by how much the cosine of each token is below 1 in the graph that has to
            become better, `[tokens]`. A token's weight in the mean is this to the power of `SHARPNESS`.
        progress: Told about each batch.
        seed: Of the random vectors. Rankings with different seeds have independent errors.

    Returns:
        By a unit's name, in the units' order.
    """
    model = load_graph(plan.source)
    names = values_needed(model)
    output = str(model.graph.outputs[0].name)
    unit_of = {linear.name: (unit, linear) for unit in plan.units for linear in unit.linears}
    lost = {unit.name: 0.0 for unit in plan.units}
    # A cosine cannot be further below 1 than 2; a token that is not finite counts like that.
    shares = [np.minimum(each, 2.0) ** SHARPNESS for each in losses]
    total = sum(float(each.sum()) for each in shares)
    generator = np.random.default_rng(seed)
    progress.step("ranking units", total=len(sample))
    for values, share in zip(values_of(plan.source, [*names, output], sample), shares, strict=True):
        tokens = values[output].astype(np.float32)
        weight = share / total if total > 0 else np.full(len(tokens), 1 / len(tokens) / len(sample))
        projected: dict[str, Array] = {}  # [PROBES, rows]
        for node, cotangent in pulled_back(model, values, _probes(tokens, weight, generator)):
            unit, linear = unit_of[str(node.name)]
            error = _product_error(plan, model, unit, linear, values[unit.input].astype(np.float32))
            each = np.einsum("kno,no->kn", cotangent, error)
            # q, k and v are of one unit: their errors meet at the output.
            projected[unit.name] = projected[unit.name] + each if unit.name in projected else each
        for name, rows in projected.items():
            lost[name] += float((rows.astype(np.float64) ** 2).sum(axis=1).mean()) / 2
        progress.advance()
    return lost


def _probes(tokens: Array, weight: Losses, generator: np.random.Generator) -> Array:
    """Random vectors `[PROBES, tokens, channels]`, orthogonal to each token and over its length."""
    lengths = np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    directions = tokens / lengths
    probes = generator.standard_normal((PROBES, *tokens.shape), np.float32)
    probes -= directions * (probes * directions).sum(axis=-1, keepdims=True)
    scaled: Array = (probes * (np.sqrt(weight)[:, None] / lengths)).astype(np.float32)
    return scaled


def _product_error(plan: Plan, model: ir.Model, unit: Unit, linear: Linear, rows: Array) -> Array:
    """What 8 bits change in a product, `[N, out]`, for the rows `[N, in]` that it reads."""
    tensor = model.graph.initializers[linear.weight].const_value
    assert tensor is not None
    weight = tensor.numpy()
    divisor = plan.divisors.get(unit.input)
    divided = rows if divisor is None else rows / divisor
    multiplied = weight if divisor is None else weight * divisor
    largest = np.abs(multiplied).max(axis=1, keepdims=True)
    scale = scale_from_magnitude(largest, plan.kind.maximum)
    error: Array = plan.rounding(unit)(divided) @ plan.kind.rounded(multiplied, scale).T
    error -= rows @ weight.T
    return error
