"""How large activations become, measured in float64, where nothing overflows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmvision_export.core.precision import PRECISIONS
from mmvision_export.models.minimax_m3_vl.encoder import SelfAttention, VisionEncoderModule
from mmvision_export.parity.stages import stage_modules

__all__ = [
    "FLOAT16_MAX",
    "NEAR_OVERFLOW",
    "Magnitude",
    "observed_magnitudes",
    "overflow_warnings",
]

FLOAT16_MAX = PRECISIONS["fp16"].largest

NEAR_OVERFLOW = 4.0
"""Activations within this factor of a type's largest value are reported: another image may exceed
what these did."""


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The largest activation of a stage.

    Attributes:
        stage: Name of the stage.
        value: Its magnitude.
        where: The tensor it was found in.
        scores_bound: Upper bound of the magnitude of a layer's scaled attention scores; None for
            other stages.
    """

    stage: str
    value: float
    where: str
    scores_bound: float | None = None


@contextlib.contextmanager
def observed_magnitudes(encoder: VisionEncoderModule) -> Iterator[dict[str, Magnitude]]:
    """Collect stage -> largest magnitude among what its modules take and give.

    That is every intermediate tensor but two. Rotation keeps the norm of each pair of channels, so
    that rotated q and k exceed q and k by sqrt(2) at most. Attention's scores, which a fused kernel
    keeps in float32 and the `matmul` body does not, are bounded by Cauchy and Schwarz: `scale *
    max|q_i| * max|k_j|` over the tokens of a head.
    """
    found: dict[str, Magnitude] = {}

    def record(stage: str, tensor: Tensor, where: str) -> None:
        before, largest = found.get(stage, Magnitude(stage, -1.0, "")), float(tensor.abs().max())
        if largest > before.value:
            found[stage] = dataclasses.replace(before, value=largest, where=where)

    def module_hook(
        stage: str, name: str, _: nn.Module, taken: tuple[Any, ...], given: Tensor
    ) -> None:
        record(stage, given, f"output of {name}")
        if stage != "embeddings":  # what that takes is pixels
            record(stage, taken[0], f"input of {name}")

    def attention_hook(
        stage: str, module: SelfAttention, taken: tuple[Any, ...], _: Tensor
    ) -> None:
        # [N, hidden] -> [N, heads, head_dim] -> longest of each head
        longest = [
            torch.linalg.vector_norm(
                projection(taken[0]).view(-1, module.num_heads, module.head_dim), dim=-1
            ).amax(0)
            for projection in (module.q_proj, module.k_proj)
        ]
        bound = float((longest[0] * longest[1]).max()) * module.head_dim**-0.5
        found[stage] = dataclasses.replace(found[stage], scores_bound=bound)

    handles = []
    for stage, top in stage_modules(encoder).items():
        for path, module in top.named_modules():
            name = f"{stage}.{path}" if path else stage
            if isinstance(module, SelfAttention):
                handles.append(module.register_forward_hook(partial(attention_hook, stage)))
            if next(module.children(), None) is None or module is top:
                handles.append(module.register_forward_hook(partial(module_hook, stage, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def overflow_warnings(magnitudes: Sequence[Magnitude], float_types: Collection[str]) -> list[str]:
    """What to tell of activations within `NEAR_OVERFLOW` of float16's largest value, or beyond it.

    Often nothing.

    Args:
        magnitudes: Of every stage.
        float_types: Those of the graphs; without float16 among them, the warning is about a graph
            that could be made.
    """
    largest = max(magnitudes, key=lambda magnitude: magnitude.value)
    whose = (
        "activations reach"
        if "fp16" in float_types
        else "in a float16 graph, activations would reach"
    )
    found = []
    if largest.value * NEAR_OVERFLOW >= FLOAT16_MAX:
        found.append(
            f"{whose} {_beside_float16(largest.value)} ({largest.where}): bfloat16 has the range"
        )
    bounds = [(m.scores_bound, m.stage) for m in magnitudes if m.scores_bound is not None]
    bound, stage = max(bounds)
    if bound * NEAR_OVERFLOW >= FLOAT16_MAX:
        found.append(
            f"attention scores may reach {_beside_float16(bound)} ({stage}), an upper bound: the matmul body, which "
            "TensorRT before 10.14 is given, computes them in float16"
        )
    return found


def _beside_float16(value: float) -> str:
    if value > FLOAT16_MAX:
        return f"{value:.4g}, beyond float16's largest value, {FLOAT16_MAX:.0f}"
    return f"{value:.4g}, within a factor of {FLOAT16_MAX / value:.2g} of float16's largest value, {FLOAT16_MAX:.0f}"
