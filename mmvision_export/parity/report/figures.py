"""The report's figures, as SVG to put into a page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mmvision_export.parity.layers import LayerComparison
from mmvision_export.parity.magnitudes import FLOAT16_MAX, NEAR_OVERFLOW
from mmvision_export.parity.samples import Sample

__all__ = ["error_figure", "heat_map_figure", "magnitude_figure", "worst_images"]

_SHOWN_IMAGES = 6
_NOT_FINITE = "#d000d0"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "text.parse_math": False,  # a file's name may have two $
    "svg.hashsalt": "mmvision",  # the same figure is the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


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
        axes.set_ylabel("relative L2 error")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        return _svg(figure)


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
        return _svg(figure)


def _token_maps(
    sample: Sample, errors: npt.NDArray[np.float64], merge: int
) -> list[npt.NDArray[np.float64]]:
    """Each image's errors in their place, `[t, h / merge, w / merge]`.

    Tokens are packed row by row, frame by frame.
    """
    maps, start = [], 0
    for t, h, w in sample.grid_thw.tolist():
        shape = (t, h // merge, w // merge)
        maps.append(errors[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)
    return maps


def worst_images(sample: Sample, errors: npt.NDArray[np.float64], merge: int) -> list[int]:
    """The images that a heat map shows.

    Those with the largest errors, not finite ones first; in packing order.
    """
    unbounded = np.where(np.isnan(errors), np.inf, errors)
    worst = [float(tokens.max()) for tokens in _token_maps(sample, unbounded, merge)]
    return sorted(sorted(range(len(worst)), key=lambda i: -worst[i])[:_SHOWN_IMAGES])


def heat_map_figure(sample: Sample, errors: npt.NDArray[np.float64], merge: int) -> str:
    """Error of each image token where it stands in its image.

    The image beneath and beside it, if it is known.

    Args:
        sample: The batch.
        errors: `[num_image_tokens]` relative L2 error, NaN where a value is not finite.
        merge: Patches per side of a token.
    """
    maps, shown = _token_maps(sample, errors, merge), worst_images(sample, errors, merge)
    panels = [(i, frame) for i in shown for frame in range(len(maps[i]))][: 2 * _SHOWN_IMAGES]
    rows = 2 if sample.pictures else 1
    columns = max(1, min(len(panels), 4))
    lines = math.ceil(len(panels) / columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 2.7 * rows * lines + 0.5), layout="constrained")
        grid = figure.subplots(rows * lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        finite = errors[np.isfinite(errors)]
        scale = Normalize(0, float(finite.max()) if len(finite) and finite.max() > 0 else 1.0)
        colours = mpl.colormaps["inferno"].with_extremes(bad=_NOT_FINITE)
        drawn = []
        for panel, (i, frame) in enumerate(panels):
            line, column = divmod(panel, columns)
            axes, tokens = grid[rows * line + rows - 1][column], maps[i][frame]
            height, width = tokens.shape
            extent = (0.0, float(width), float(height), 0.0)
            alpha = 1.0
            if sample.pictures:
                picture, alpha = sample.pictures[i], 0.75
                grid[rows * line][column].imshow(picture, extent=extent, interpolation="bilinear")
                grid[rows * line][column].set_title(f"{sample.files[i]}: as encoded", fontsize=9)
                # Pale, so that what is dark is a small error and not a dark image.
                axes.imshow(picture.convert("L"), extent=extent, cmap="gray", vmin=-512, vmax=255)
            masked = np.ma.masked_invalid(tokens)
            drawn.append(
                axes.imshow(
                    masked,
                    cmap=colours,
                    norm=scale,
                    extent=extent,
                    alpha=alpha,
                    interpolation="nearest",
                )
            )
            name = "error" if sample.pictures else f"image {i}"
            frames = f", frame {frame}" if len(maps[i]) > 1 else ""
            axes.set_title(f"{name}{frames}: {height} x {width} tokens", fontsize=9)
        figure.colorbar(
            drawn[0], ax=grid, label="relative L2 error of a token", shrink=0.8, format="%.1e"
        )
        return _svg(figure)
