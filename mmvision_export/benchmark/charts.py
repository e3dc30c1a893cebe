"""A result's pictures, as SVG files that are read on a white page and on a dark one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmvision_export.benchmark.result import Measurement, Result
from mmvision_export.benchmark.workloads import Workload

__all__ = ["CHARTS", "charts_of", "write_charts"]

_INK = "#737c87"
"""Text and axes: grey with enough contrast on white and on a dark page alike."""
_COLOURS = ("#2f81f7", "#d1741b", "#8957e5", "#2da44e", "#d6409f", "#c93c37", "#1b9e9e", "#9a6700")
"""One for each implementation; what computes in fewer bits has the colour, and dashes or a light bar."""
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "svg.hashsalt": "mmvision",  # the same chart is the same file
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
}
_LABEL_GAP = 13.0
"""Least distance of two labels, in points."""
_TICK_RATIO = 1.6
"""Least ratio of two sizes that both have their number below the axis."""
_WIDTH = 6.6
"""Of a chart, in inches: its text can still be read where a page is 500 pixels wide."""
_LETTER = 0.08
"""Mean width of a letter of a label, in inches, with room to spare for another sans-serif font."""


def _colours(result: Result) -> dict[str, str]:
    """One colour for each implementation, whatever its precision."""
    families = list(dict.fromkeys(_family(side) for side in result.sides))
    return {side: _COLOURS[families.index(_family(side)) % len(_COLOURS)] for side in result.sides}


def _family(side: str) -> str:
    # The graph in fewer bits has the colour of its backend; the portable graph is another side.
    backend, _, graph = side.partition(":")
    return backend.removesuffix("-bf16") + ("" if "int8" in graph else graph)


def _is_exact(result: Result, side: str) -> bool:
    return bool(result.sides[side]["precision"] == result.model["precision"])


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, by least squares next to the ascending wanted ones."""
    # Isotonic regression of wanted - gap * index: neighbours out of order share their mean.
    blocks: list[tuple[float, int]] = []
    for index, place in enumerate(wanted):
        mean, count = place - gap * index, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        blocks.append((mean, count))
    level = [mean for mean, count in blocks for _ in range(count)]
    return [mean + gap * index for index, mean in enumerate(level)]


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each side's name beside the last of its points, names apart from each other.

    Args:
        axes: Drawn, with its limits set.
        ends: x, y, label and colour of each.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    box = axes.get_window_extent()
    top, bottom = box.y1 * points, box.y0 * points
    wanted = sorted(
        (float(axes.transData.transform((x, y))[1]) * points, x, y, label, colour)
        for x, y, label, colour in ends
    )
    places = _apart([height for height, *_ in wanted], _LABEL_GAP)
    shift = min(0.0, top - places[-1]) if places else 0.0
    places = [place + shift for place in places]
    for place, (_, x, y, label, colour) in zip(places, wanted, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.06, (place - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9.5,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.55,
                "linewidth": 0.8,
                "relpos": (0, 0.5),  # from the middle of the label's left side
                "shrinkA": 2,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def _label_width(result: Result) -> float:
    """Share of a chart's width that the longest label takes."""
    return _LETTER * max(len(result.label(side)) for side in result.sides) / _WIDTH


def _axes(result: Result, title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 4.4))
    axes = figure.add_axes((0.12, 0.12, 0.83 - _label_width(result), 0.78))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.text(0.01, 0.95, title, fontsize=11, va="center")
    axes.grid(alpha=0.25, color=_INK)
    return figure, axes


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}"


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _bars(result: Result) -> Figure:
    workload = result.photograph
    rows = result.fastest_first(workload)[::-1] if workload else []
    colours = _colours(result)
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * max(1, len(rows))))
    top, bottom = 0.45 / figure.get_figheight(), 0.1 / figure.get_figheight()
    left = 0.02 + _label_width(result)
    axes = figure.add_axes((left, bottom, 0.9 - left, 1 - top - bottom))
    for place, (side, seconds) in enumerate(rows):
        exact = _is_exact(result, side)
        axes.barh(
            place,
            seconds,
            height=0.66,
            color=colours[side] if exact else "none",
            edgecolor=colours[side],
            hatch=None if exact else "////",
        )
        axes.annotate(
            f"{seconds:.3g} s",
            (seconds, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), [result.label(side) for side, _ in rows])
    axes.set_xlim(0, 1.08 * max((seconds for _, seconds in rows), default=1.0))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    size = f"{workload.patches:,} patches" if workload else "none was measured"
    figure.text(
        0.01, 1 - 0.5 * top, f"Seconds for one photograph of {size}; shorter is faster",
        fontsize=11, va="center",
    )  # fmt: skip
    return figure


def _lines(
    result: Result,
    series: str,
    x: Callable[[Workload], float],
    y: Callable[[Workload, Measurement], float],
    words: tuple[str, str, str],
    *,
    logarithmic: bool,
) -> Figure:
    figure, axes = _axes(result, *words)
    colours = _colours(result)
    ends, ticks = [], set()
    for index, side in enumerate(result.sides):
        points = sorted(
            (x(w), y(w, m))
            for w in result.workloads
            if series in w.series and (m := result.of(side, w.name)) is not None
        )
        if not points:
            continue
        ticks |= {point[0] for point in points}
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            color=colours[side],
            marker="o",
            markersize=3.5,
            linestyle="-" if _is_exact(result, side) else "--",
            linewidth=2.4 if index == 0 else 1.3,
            zorder=3 if index == 0 else 2,
        )
        ends.append((*points[-1], result.label(side), colours[side]))
    axes.set_xscale("log", base=2)
    if logarithmic:
        _logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
    shown: list[float] = []
    for tick in sorted(ticks):
        if not shown or tick >= _TICK_RATIO * shown[-1]:
            shown.append(tick)
    axes.set_xticks(shown, [f"{tick:,.0f}" for tick in shown])
    axes.minorticks_off()
    _label_ends(axes, ends)
    return figure


def _latency(result: Result) -> Figure:
    words = ("Seconds for one image, by its size", "patches of the image", "seconds, median")
    return _lines(
        result, "patches", lambda w: w.patches, lambda _, m: m.median, words, logarithmic=True
    )


def _throughput(result: Result) -> Figure:
    each = next((w.grid[0] for w in result.workloads if "images" in w.series), (1, 0, 0))
    patches = each[0] * each[1] * each[2]
    words = (
        "Patches per second, by the number of equal images",
        f"images of {patches:,} patches",
        "patches per second",
    )
    return _lines(
        result,
        "images",
        lambda w: len(w.grid),
        lambda w, m: w.patches / m.median,
        words,
        logarithmic=False,
    )


def _memory(result: Result) -> Figure:
    words = ("Memory while running, by the size of one image", "patches of the image", "MB")
    return _lines(
        result,
        "patches",
        lambda w: w.patches,
        lambda _, m: max(m.above_bytes, 1 << 20) / 1e6,
        words,
        logarithmic=True,
    )


def _roofline(result: Result) -> Figure:
    figure, axes = _axes(
        result,
        "Arithmetic reached, and the peak of a float32 matrix product",
        "FLOP per byte of least traffic",
        "GFLOP/s",
    )
    colours, ends = _colours(result), []
    for side in result.sides:
        if not _is_exact(result, side):
            continue  # the peak is that of float32 products
        points = [
            (result.flops(w) / result.least_bytes(w), result.flops(w) / m.median / 1e9)
            for w in result.workloads
            if (m := result.of(side, w.name)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=4.5, color=colours[side])
            ends.append((*max(points), result.label(side), colours[side]))
    peak = result.gemm_peak_gflops
    axes.axhline(peak, color=_INK, linestyle="--", linewidth=1)
    axes.annotate(
        f"measured peak, {peak:.0f} GFLOP/s",
        (0.02, peak),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_plain))
    axes.set_ylim(0, 1.15 * peak)
    _label_ends(axes, ends)
    return figure


CHARTS: Mapping[str, Callable[[Result], Figure]] = {
    "photograph.svg": _bars,
    "latency.svg": _latency,
    "throughput.svg": _throughput,
    "memory.svg": _memory,
    "roofline.svg": _roofline,
}
"""File name -> how its chart is drawn."""


_SERIES = {"latency.svg": "patches", "throughput.svg": "images", "memory.svg": "patches"}


def charts_of(result: Result) -> list[str]:
    """File names of the charts that a result has: one point makes no line."""
    names = [] if result.photograph is None else ["photograph.svg"]
    for name, series in _SERIES.items():
        if len([w for w in result.workloads if series in w.series]) > 1:
            names.append(name)
    return [*names, "roofline.svg"]


def write_charts(result: Result, folder: Path) -> None:
    """Draw the charts that a result has as SVG files into an existing folder."""
    with mpl.rc_context(_STYLE):
        for name in charts_of(result):
            CHARTS[name](result).savefig(
                folder / name,
                format="svg",
                transparent=True,
                metadata={"Date": None, "Creator": None},
            )
