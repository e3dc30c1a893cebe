"""The report's figures, as SVG to put into a page."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mmvision_export.parity.layers import LayerComparison
from mmvision_export.parity.magnitudes import FLOAT16_MAX, NEAR_OVERFLOW

__all__ = ["error_figure", "magnitude_figure"]

_INK = "#010203"
"""Lines and text, which become the page's own colour: dark, or light in a dark theme."""
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "text.parse_math": False,  # a file's name may have two $
    "svg.hashsalt": "mmvision",  # the same figure is the same file
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(figure: Figure, words: str) -> str:
    """An SVG with no background, which a screen reader reads as these words."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue().replace(_INK, "currentColor")
    label = html.escape(words, quote=True)
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _power_of_ten(value: float, _: int) -> str:
    """In plain letters: formulas are switched off, for names with two `$`."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _stage_axis(axes: Axes, stages: Sequence[str]) -> None:
    short = {
        "embeddings": "patch embedding",
        "multi_modal_projector": "projector",
        "patch_merge_mlp": "merger",
    }
    labels = [short.get(stage, stage.replace("layers.", "layer ")) for stage in stages]
    # At 32 layers every other name is enough.
    step = 1 if len(stages) <= 20 else 2
    shown = [i for i in range(len(stages)) if i % step == 0 or not stages[i].startswith("layers.")]
    axes.set_xticks(
        shown, [labels[i] for i in shown], rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlim(-0.5, len(stages) - 0.5)


def error_figure(layers: LayerComparison) -> str:
    """Error of each graph at each stage, beside PyTorch's, and where it jumps."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        axes = figure.subplots()
        stages = [magnitude.stage for magnitude in layers.magnitudes]
        place = {stage: index for index, stage in enumerate(stages)}
        for index, (name, graph) in enumerate(layers.graphs.items()):
            if not graph.stages:
                continue  # a CPU flavour's have no values of their own
            colour = f"C{index}"
            errors = [row.distance.relative_l2 for row in graph.stages]
            axes.semilogy(
                [place[r.stage] for r in graph.stages],
                errors,
                "o-",
                color=colour,
                markersize=4,
                label=name,
            )
            if not graph.facts.is_quantized:
                eager = [row.distance.relative_l2 for row in layers.eager[graph.facts.float_type]]
                axes.semilogy(
                    range(len(stages)),
                    eager,
                    "--",
                    color=colour,
                    alpha=0.7,
                    label=f"PyTorch in {graph.facts.float_type}",
                )
            if graph.jump is not None:
                at = place[graph.jump.stage]
                axes.axvline(at, color="#c0392b", alpha=0.5, linewidth=6)
                side = 1 if at < len(stages) / 2 else -1
                axes.annotate(
                    f"{name}:\njumps here",
                    (at, 0.97),
                    xycoords=("data", "axes fraction"),
                    xytext=(6 * side, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="top",
                    color="#c0392b",
                )
        _stage_axis(axes, stages)
        axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        axes.set_ylabel("relative L2 error")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        return _svg(figure, _error_words(layers))


def _error_words(layers: LayerComparison) -> str:
    """What the figure shows, for who does not see it."""
    said = [
        f"{name} ends at {graph.stages[-1].distance.relative_l2:.1e}"
        + (f" and jumps at {graph.jump.stage}" if graph.jump is not None else "")
        for name, graph in layers.graphs.items()
        if graph.stages
    ]
    return f"Error by stage: {', '.join(said)}"


def magnitude_figure(layers: LayerComparison) -> str:
    """Largest activation of each stage, below the largest value of float16."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        axes = figure.subplots()
        stages = [magnitude.stage for magnitude in layers.magnitudes]
        values = [magnitude.value for magnitude in layers.magnitudes]
        danger = [value * NEAR_OVERFLOW >= FLOAT16_MAX for value in values]
        axes.bar(
            range(len(stages)),
            values,
            width=0.65,
            color=["#c0392b" if d else "#4c78a8" for d in danger],
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        bottom = min(0.5, min((value for value in values if value > 0), default=0.5) / 2)
        axes.set_ylim(bottom, max(FLOAT16_MAX * 8, max(values) * 4))
        axes.axhspan(FLOAT16_MAX / NEAR_OVERFLOW, FLOAT16_MAX, color="#f39c12", alpha=0.2)
        axes.axhline(FLOAT16_MAX, color="#c0392b", linewidth=1.5)
        right = len(stages) - 0.55
        axes.text(
            right,
            FLOAT16_MAX * 1.25,
            f"float16 overflows above {FLOAT16_MAX:.0f}",
            color="#c0392b",
            ha="right",
        )
        near = f"within a factor of {NEAR_OVERFLOW:g}: too close"
        axes.text(right, FLOAT16_MAX / 2, near, color="#9c640c", ha="right", va="center")
        _stage_axis(axes, stages)
        axes.set_ylabel("largest |activation|")
        largest = max(values)
        words = (
            f"Largest activation by stage: at most {largest:.4g}, float16 ends at {FLOAT16_MAX:.0f}"
        )
        return _svg(figure, words)
