"""What is measured: batches of every kind, and how much work each is."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs, products_of

__all__ = ["PHOTOGRAPHS", "QUICK", "STANDARD", "Work", "Workload", "work_of", "workloads_for"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One batch.

    Attributes:
        name: Says what it is.
        series: Which plots it is in: `patches` (one image of any size), `images` (any number of
            equal ones).
        grid: Rows (t, h, w) in patches.
    """

    name: str
    series: tuple[str, ...]
    grid: tuple[tuple[int, int, int], ...]

    @property
    def patches(self) -> int:
        """Patches of all images together."""
        return sum(t * h * w for t, h, w in self.grid)


def _one(side: int, *also: str) -> Workload:
    return Workload(f"1 image of {side * side} patches", ("patches", *also), ((1, side, side),))


def _equal(count: int, side: int) -> Workload:
    return Workload(
        f"{count} images of {side * side} patches", ("images",), ((1, side, side),) * count
    )


def _mixed(count: int, largest: int) -> Workload:
    sides = np.random.default_rng(0).integers(4, largest // 2 + 1, (count, 2)) * 2
    rows = tuple((1, int(h), int(w)) for h, w in sides)
    return Workload(f"{count} images of mixed sizes", (), rows)


QUICK = (
    _one(8, "images"),
    _one(16),
    _equal(4, 8),
    _mixed(4, 16),
    Workload("video, 2 rows of 4 frames", (), ((4, 4, 8),) * 2),
)
"""Seconds, for CI."""

STANDARD = (
    _one(8),
    _one(16, "images"),
    _one(32),
    _one(64),
    *(_equal(count, 16) for count in (4, 16, 64)),
    Workload("8 images of 1024 patches", (), ((1, 32, 32),) * 8),
    _mixed(16, 44),
    Workload("video, 4 rows of 4 frames", (), ((4, 16, 16),) * 4),
    _one(128),
)
"""What `docs/benchmarks.md` shows."""


PHOTOGRAPHS = (
    _one(64),
    _mixed(16, 44),
    _equal(4, 64),
    # 2016 x 1344 pixels, and 2016 x 2016: what a server makes of 3:2 and of a square.
    Workload("1 image of 13824 patches", ("patches",), ((1, 96, 144),)),
    _one(144),
    _one(256),
)
"""What `docs/photographs.md` shows: full-size photographs, to the largest image a server takes."""


def workloads_for(names: str) -> tuple[Workload, ...]:
    """The workloads of a set, `quick`, `standard` or `photographs`.

    Raises:
        InputError: There is no such set.
    """
    sets = {"quick": QUICK, "standard": STANDARD, "photographs": PHOTOGRAPHS}
    if names not in sets:
        raise InputError(
            f"no such set of workloads: {names}", hint=f"choose one of: {', '.join(sets)}"
        )
    # By size: what an allocator keeps of a large batch would count for the smaller ones after it.
    return tuple(sorted(sets[names], key=lambda workload: workload.patches))


@dataclasses.dataclass
class Work:
    """What one operator of the graph, or the whole of it, does for one batch.

    Attributes:
        flops: Floating-point operations of matrix products and attention, a multiply-add counted as
            two.
        bytes: Least traffic: each weight, input and output once.
    """

    flops: float
    bytes: float


def work_of(
    config: EncoderConfig, grid: tuple[tuple[int, int, int], ...], *, bytes_per_value: int = 4
) -> dict[str, Work]:
    """The work of each kind of operator, over all layers.

    Args:
        config: The encoder's dimensions.
        grid: Rows (t, h, w) in patches.
        bytes_per_value: 4 for float32, 2 for float16.

    Returns:
        `patch embedding`, `attention projections`, `attention`, `MLP`, `projector`, `merger`. A
        test holds them equal to a count over the nodes of the exported graph.
    """
    lengths = [t * h * w for t, h, w in grid]
    patches, costs = sum(lengths), Costs(config, masked=False)
    work = {"attention": Work(float(costs.attention(sum(n * n for n in lengths))), 0.0)}
    # q, k, v and what comes out, of every layer.
    values = 4 * patches * config.hidden_size * config.num_hidden_layers
    work["attention"].bytes += float(values * bytes_per_value)
    for product in products_of(config):
        rows = patches // config.patches_per_token if product.per_token else patches
        k, n = product.columns_in, product.columns_out
        part = work.setdefault(product.part, Work(0.0, 0.0))
        part.flops += 2.0 * product.times * rows * k * n
        part.bytes += float(product.times * (k * n + rows * (k + n)) * bytes_per_value)
    return work
