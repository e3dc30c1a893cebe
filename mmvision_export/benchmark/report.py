"""A result as a page with plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmvision_export.benchmark.measure import EMULATED_MAX_PATCHES, MAX_PATCHES
from mmvision_export.benchmark.result import Measurement, Result
from mmvision_export.benchmark.scaling import scaling_markdown
from mmvision_export.benchmark.sides import label_of
from mmvision_export.benchmark.workloads import Workload

__all__ = ["PLOTS", "page_from_result", "write_plots"]

PLOTS = {
    "latency.png": "Time of one image against its size",
    "throughput.png": "Patches per second against the number of equal images",
    "memory.png": "Peak memory while running, above that of the opened model",
    "roofline.png": "Achieved arithmetic against the measured peak of a matrix product",
}
"""File name -> what it shows."""


def write_plots(result: Result, folder: Path) -> None:
    """Draw the plots as PNG files into an existing folder."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    def draw(
        name: str,
        series: str | None,
        x: Callable[[Workload], float],
        y: Any,
        xlabel: str,
        ylabel: str,
    ) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        ticks: set[float] = set()
        for index, (side, facts) in enumerate(result.sides.items()):
            if name == "roofline.png" and facts["precision"] != result.model["precision"]:
                continue  # the peak is that of float32 products
            points = [
                (x(w), y(w, m))
                for w in result.workloads
                if (series is None or series in w.series)
                and (m := result.of(side, w.name)) is not None
            ]
            if points:
                points.sort()
                ticks |= {point[0] for point in points}
                # Ten colours, and more sides than that: what is in fewer bits is dashed.
                exact = facts["precision"] == result.model["precision"]
                line = "none" if series is None else "-" if exact else "--"
                width, order = (2.2, 3) if index == 0 else (1.2, 2)
                xs, ys = zip(*points, strict=True)
                axes.plot(
                    xs,
                    ys,
                    color=f"C{index % 10}",
                    marker="o",
                    markersize=4,
                    label=label_of(side),
                    linestyle=line,
                    linewidth=width,
                    zorder=order,
                )
        axes.set_xscale("log", base=2)
        if name in ("latency.png", "memory.png"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        if name == "roofline.png":
            axes.axhline(result.gemm_peak_gflops, color="black", linestyle="--", linewidth=1)
            axes.annotate(
                f"measured GEMM peak, {result.gemm_peak_gflops:.0f} GFLOP/s",
                (0.02, result.gemm_peak_gflops),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=8,
            )
            axes.set_ylim(0, 1.15 * result.gemm_peak_gflops)
        else:
            axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        axes.set(xlabel=xlabel, ylabel=ylabel, title=PLOTS[name])
        axes.grid(alpha=0.3)
        if ticks:
            axes.legend(fontsize=8)
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)

    def latency(_: Workload, m: Measurement) -> float:
        return m.median * 1e3

    def throughput(w: Workload, m: Measurement) -> float:
        return w.patches / m.median

    def memory(_: Workload, m: Measurement) -> float:
        return max(m.above_bytes, 1 << 20) / 1e6

    def gflops(w: Workload, m: Measurement) -> float:
        return result.flops(w) / m.median / 1e9

    def intensity(w: Workload) -> float:
        return result.flops(w) / float(result.model["bytes"][w.name])

    draw(
        "latency.png",
        "patches",
        lambda w: w.patches,
        latency,
        "patches of the image",
        "milliseconds, median",
    )
    each = next((w.grid[0] for w in result.workloads if "images" in w.series), (1, 0, 0))
    images = f"images of {each[0] * each[1] * each[2]} patches"
    draw(
        "throughput.png", "images", lambda w: len(w.grid), throughput, images, "patches per second"
    )
    draw("memory.png", "patches", lambda w: w.patches, memory, "patches of the image", "MB")
    draw("roofline.png", None, intensity, gflops, "FLOP per byte of least traffic", "GFLOP/s")


_TITLES = {
    "standard": "Benchmarks on a CPU",
    "photographs": "Photographs at full size on a CPU",
}


def page_from_result(result: Result, *, plots: str) -> str:
    """The page as Markdown; `plots` is the plots' folder as seen from it."""
    first, *others = result.sides
    ours_label, other_labels = label_of(first), [label_of(name) for name in others]
    machine = result.machine
    config = result.model["config"]
    lines = [
        f"# {_TITLES.get(result.workload_set, _TITLES['standard'])}",
        "",
        f"Written by `mmvision benchmark` on {machine['date']}: {machine['cpus']} CPUs ({machine['cpu']}), "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}, Python {machine['python']}, mmvision-export "
        f"{machine['mmvision-export']}. Every side ran the same weights and inputs with {result.threads} threads, in a process "
        "of its own; the sides took turns, a run of each in every round, and their outputs were compared.",
        "",
        f"The model: {config['num_hidden_layers']} layers of hidden size {config['hidden_size']}, with the projector and patch "
        f"merger to {config['text_hidden_size']}, {result.model['source']} weights, {result.model['precision']}.",
        "",
        "**patches** are the 14 x 14 squares an image is cut into; four of them become one *image token* of the language model. "
        "The encoder is the part of MiniMax-M3-VL that turns the first into the second.",
        "",
        "| side | named | version | precision | to open | memory once open |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for name, facts in result.sides.items():
        lines.append(
            f"| {label_of(name)} | `{name}` | {facts['version']} | {facts['precision']} | {facts['open_s']:.1f} s | {facts['rss_bytes'] / 1e9:.2f} GB |"
        )
    products = ", ".join(f"{rate:.0f} ({name})" for name, rate in result.gemm_gflops.items())
    lines += [
        "",
        f"The best product of float32 matrices, 1024 x 1280 by "
        f"1280 x 5120, of each runtime, in GFLOP/s: {products}; the fastest is the *GEMM peak* below.",
        "",
        f"## How many times as long the others take as {ours_label}",
        "",
        "The median over rounds of the quotient of both times; above 1, the first side is faster.",
        "",
        "| workload | patches | "
        + f"{ours_label}, median (range) | of GEMM peak | image tokens/s | "
        + " | ".join(other_labels)
        + " |",
        "| --- | ---: | ---: | ---: | ---: | " + " | ".join("---:" for _ in others) + " |",
    ]
    for workload in result.workloads:
        ours = result.of(first, workload.name)
        if ours is None:
            continue
        ratios = [result.ratio(other, workload.name) for other in others]
        share = result.flops(workload) / ours.median / 1e9 / result.gemm_peak_gflops
        tokens = workload.patches / result.model["patches_per_token"] / ours.median
        lines.append(
            f"| {workload.name} | {workload.patches} | {ours.median:.3g} s ({min(ours.seconds):.3g} to "
            f"{max(ours.seconds):.3g}, {len(ours.seconds)} run{'s' * (len(ours.seconds) > 1)}{'' if ours.warm else ', cold'}) | {share:.0%} | {tokens:.0f} | "
            + " | ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )
    lines += _notes(result)
    disturbed = [m for m in result.measurements if m.foreign_cpus > 0.1]
    if disturbed:
        worst = max(disturbed, key=lambda m: m.foreign_cpus)
        lines += [
            "",
            f"**The machine was not quiet**: in {len(disturbed)} of {len(result.measurements)} measurements other processes used "
            f"more than a tenth of a CPU, at most {worst.foreign_cpus:.1f} CPUs ({label_of(worst.side)}, {worst.workload}). Ratios suffer less "
            "than times, since both sides of a round were disturbed alike, but measure again.",
        ]
    lines += _accuracy_lines(result)
    lines += [
        "",
        "## Memory",
        "",
        "Peak resident memory while running, above that of the opened model, in MB. It includes what an allocator keeps of smaller batches. What is still kept of opening the model counts as opened, which is much for PyTorch.",
        "",
        "| workload | " + " | ".join([ours_label, *other_labels]) + " |",
        "| --- | " + " | ".join("---:" for _ in result.sides) + " |",
    ]
    for workload in result.workloads:
        found = [result.of(side, workload.name) for side in result.sides]
        cells = ["-" if m is None else f"{max(0, m.above_bytes) / 1e6:.0f}" for m in found]
        lines.append(f"| {workload.name} | {' | '.join(cells)} |")
    lines += ["", "## Plots", ""]
    lines += [f"![{title}]({plots}/{name})\n" for name, title in PLOTS.items()]
    page = "\n".join(lines) + "\n"
    if result.workload_set == "photographs":
        return page + scaling_markdown(result)
    return page


def _notes(result: Result) -> list[str]:
    """What a reader of the table of times has to know."""
    notes = []
    if {entry.partition(": ")[0] for entry in result.skipped} & set(MAX_PATCHES):
        notes.append("A dash: not run, since its dense attention would not fit.")
    if emulated := [label_of(name) for name in result.emulated()]:
        notes.append(
            "This CPU has no products of bfloat16, so that PyTorch emulates them, which takes "
            f"several times as long as float32. {'; '.join(emulated)}: run once a workload, "
            f"and up to {EMULATED_MAX_PATCHES} patches."
        )
    for entry, said in result.refused.items():
        side, _, workload = entry.rpartition(": ")
        notes.append(f"{label_of(side)} refused {workload} before it began: {said}.")
    return ["", *notes]


def _accuracy_lines(result: Result) -> list[str]:
    """What the sides in fewer bits than the model's lose, measured on every workload they ran."""
    precision = result.model["precision"]
    reduced = [name for name, facts in result.sides.items() if facts["precision"] != precision]
    if not reduced:
        return []
    lines = [
        "",
        "## What fewer bits cost",
        "",
        f"Every image token compared with the first side in {precision}: the least cosine "
        "similarity over all workloads, and the largest relative L2 distance.",
        "",
        "| side | precision | least cosine | largest relative L2 |",
        "| --- | --- | ---: | ---: |",
    ]
    for name in reduced:
        rows = [m for m in result.measurements if m.side == name]
        if rows:
            cosine, distance = min(m.min_cosine for m in rows), max(m.relative_l2 for m in rows)
            cells = (label_of(name), result.sides[name]["precision"], f"{cosine:.6f}")
            lines.append(f"| {' | '.join(cells)} | {distance:.1e} |")
    return lines
