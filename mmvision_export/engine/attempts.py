"""The ways to build one engine, best first, and the first of them that builds.

A builder may find no kernel for a graph that its parser took. What it then says differs between
versions and names no operator of ours, so any of its failures is an occasion to write the graph
otherwise. A parser's failure is not: it names what is wrong. Nor is a lack of memory, because the
engine would stay slower for good where the memory was short once.

Each way of attention is tried with every form of LayerNormalization before the next way: the form
costs little at run time, and the next way may cost the square of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from mmvision_export.core.errors import EngineError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import Lowering
from mmvision_export.engine.builder import BuilderError, Plan
from mmvision_export.engine.layer_norm import LayerNormForm, layer_norm_form_for_parser
from mmvision_export.engine.parser_support import ParserVersion

__all__ = ["Attempt", "Built", "attempts_from_lowering", "first_that_builds"]

# What TensorRT-RTX 1.7 says where attention has no fused kernel, which no LayerNormalization mends.
_NO_FUSED_KERNEL = "not supported by a dedicated kernel"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to build an engine.

    Attributes:
        lowering: How attention is done.
        layer_norms: How LayerNormalization is written.
        decomposable: Whether attention layers may be built from several kernels.
    """

    lowering: Lowering
    layer_norms: LayerNormForm
    decomposable: bool

    @property
    def fused(self) -> bool:
        """Whether every attention layer is one fused kernel, if this builds."""
        return self.lowering.library is None and not self.decomposable

    def __str__(self) -> str:
        attention = self.lowering.attention(fused=self.fused)
        kernels = "fused " if attention.fused else ""
        norms = ", separate LayerNormalization" if self.layer_norms == "separate" else ""
        return f"{kernels}{attention.way} attention{norms}"


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine.

    Attributes:
        attempt: How it was built.
        plan: It.
        passed_over: What could not be built before, in the order it was tried, and why.
    """

    attempt: Attempt
    plan: Plan
    passed_over: dict[str, str]


def attempts_from_lowering(
    lowering: Lowering, *, precision: str, parser: ParserVersion
) -> list[Attempt]:
    """All ways to build an engine, best first.

    Args:
        lowering: How attention shall be done; its fallbacks follow.
        precision: Of the engine.
        parser: The TensorRT whose parser reads the graph.
    """
    forms: list[LayerNormForm] = [layer_norm_form_for_parser(parser)]
    if "separate" not in forms:
        forms.append("separate")
    attempts: list[Attempt] = []
    way: Lowering | None = lowering
    while way is not None:
        for decomposable in _permissions(way, precision):
            attempts += [Attempt(way, form, decomposable) for form in forms]
        way = way.fallback
    return attempts


def _permissions(lowering: Lowering, precision: str) -> Sequence[bool]:
    """Whether attention may be built from several kernels, in the order that is tried."""
    if lowering.body == "packed":
        # From several kernels it would cost the square of the batch, which it is there to avoid.
        return (False,)
    form = lowering.attention(fused=False).body
    if form == "attention" and PRECISIONS[precision].has_half_attention:
        # Without permission to decompose, the builder fails rather than fall back to unfused
        # kernels in silence.
        return (False, True)
    # No TensorRT has a fused attention kernel in float32.
    return (True,)


def first_that_builds(
    attempts: Sequence[Attempt], build: Callable[[Attempt], Plan], progress: Progress
) -> Built:
    """Build an engine in the first way that the builder can.

    Args:
        attempts: Best first, at least one.
        build: Gives a plan, or raises `BuilderError` where another way is worth an attempt.
        progress: Told what could not be built, and why.

    Raises:
        EngineError: The first way's error, where none can be built, or what else `build` raises.
    """
    remaining = list(attempts)
    passed_over: dict[str, str] = {}
    first: BuilderError | None = None
    while remaining:
        attempt = remaining.pop(0)
        try:
            return Built(attempt, build(attempt), passed_over)
        except BuilderError as error:
            first = first or error
            passed_over[str(attempt)] = error.message
            if _NO_FUSED_KERNEL in str(error):
                remaining = [each for each in remaining if not _same_attention(each, attempt)]
            if remaining:
                progress.note(_note(attempt, remaining[0], error))
    assert first is not None
    others = list(passed_over)[1:]
    if not others:
        raise first
    raise EngineError(f"{first}\n  these could not be built either: {'; '.join(others)}") from first


def _same_attention(a: Attempt, b: Attempt) -> bool:
    return (a.lowering, a.decomposable) == (b.lowering, b.decomposable)


def _note(attempt: Attempt, following: Attempt, error: BuilderError) -> str:
    was, becomes = (each.lowering.attention(fused=False) for each in (attempt, following))
    costs = (
        ", which costs the square of the whole batch" if becomes.masked and not was.masked else ""
    )
    return f"{attempt} could not be built, building {following}{costs}: {error.message}"
