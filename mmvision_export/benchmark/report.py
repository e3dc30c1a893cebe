"""A result as a page: the answer first, then the tables, each no wider than a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmvision_export.benchmark.charts import charts_of
from mmvision_export.benchmark.measure import EMULATED_MAX_PATCHES, MAX_PATCHES
from mmvision_export.benchmark.result import Result
from mmvision_export.benchmark.scaling import scaling_markdown
from mmvision_export.benchmark.sides import PEERS
from mmvision_export.benchmark.workloads import Workload
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["page_from_result"]

_TITLES = {
    "standard": "Benchmarks on a CPU",
    "photographs": "Photographs at full size on a CPU",
}
_SIDES_PER_TABLE = 5
"""More columns would make a table wider than a page on the web."""
_DISTURBED_CPUS = 0.1


def page_from_result(result: Result, *, plots: str) -> str:
    """The page as Markdown; `plots` is the charts' folder as seen from it."""
    first = next(iter(result.sides))
    lines = [f"# {_TITLES.get(result.workload_set, _TITLES['standard'])}", "", *_answer(result)]

    def chart(name: str, words: str) -> list[str]:
        return ["", f"![{words}]({plots}/{name})"] if name in charts_of(result) else []

    lines += chart("photograph.svg", _bars_in_words(result))
    lines += [
        "",
        *_circumstances(result),
        "",
        "## Time",
        "",
        *_times(result),
        *_disturbance(result),
    ]
    if len(result.sides) > 1:
        lines += [
            "",
            f"### Times as long as {result.label(first)}",
            "",
            f"Each figure is the time of a side divided by the time of {result.label(first)} in the same round, median over "
            "the rounds. **Below 1 is faster.**",
        ]
        others = [side for side in result.sides if side != first]
        lines += _by_side(result, others, lambda side, workload: _two(result.ratio(side, workload)))
    lines += _notes(result)
    lines += chart("latency.svg", "Seconds for one image of each side, by the size of the image.")
    lines += chart(
        "throughput.svg",
        "Patches per second of each side, by the number of equal images in a batch.",
    )
    lines += _accuracy(result)
    lines += [
        "",
        "## Memory",
        "",
        "Peak resident memory while running, above the memory of the opened model, in MB. A figure includes memory that the "
        "runtime keeps from smaller batches. Memory that PyTorch keeps from opening the model counts as opened.",
    ]
    lines += _by_side(result, list(result.sides), lambda side, name: _megabytes(result, side, name))
    lines += chart(
        "memory.svg", "Memory of each side while it runs one image, by the size of the image."
    )
    rates = "; ".join(f"{name} {rate:.0f}" for name, rate in result.gemm_gflops.items())
    lines += [
        "",
        "## Share of the peak",
        "",
        "The fastest float32 product of 1024 x 1280 by 1280 x 5120 of each runtime, in GFLOP/s: "
        f"{rates}. The best of them is the *peak* of the table and of this chart.",
    ]
    lines += chart(
        "roofline.svg", "GFLOP/s that each side reaches on each workload, below the measured peak."
    )
    lines += ["", "## The sides", "", *_sides(result)]
    page = "\n".join(lines) + "\n"
    if result.workload_set == "photographs":
        return page + "\n" + scaling_markdown(result)
    return page


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Lines of a table; the first `words` columns hold words, the others numbers."""
    # A name or a figure stays in one line: a table of two-line rows is twice as long.
    rows = [[cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row] for row in rows]
    marks = ["---" if index < words else "---:" for index in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows)]


def _by_side(
    result: Result, sides: Sequence[str], cell: Callable[[str, str], str]
) -> list[str]:  # fmt: skip
    """Tables of workloads by sides: the sides in the model's precision, then those in fewer bits."""
    exact = [side for side in sides if _is_exact(result, side)]
    reduced = [side for side in sides if not _is_exact(result, side)]
    lines: list[str] = []
    for group in (exact, reduced):
        for start in range(0, len(group), _SIDES_PER_TABLE):
            shown = group[start : start + _SIDES_PER_TABLE]
            rows = [[w.name, *(cell(side, w.name) for side in shown)] for w in result.workloads]
            if lines and group is reduced:
                lines += ["", "In fewer bits:"]
            lines += ["", *_table(["workload", *map(result.label, shown)], rows)]
    return lines


def _is_exact(result: Result, side: str) -> bool:
    return bool(result.sides[side]["precision"] == result.model["precision"])


def _date(written: str) -> str:
    """`2026-11-26T07:13+00:00` as people write it."""
    return written.replace("T", " ").replace("+00:00", " UTC")


def _two(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _megabytes(result: Result, side: str, workload: str) -> str:
    found = result.of(side, workload)
    return "-" if found is None else f"{max(0, found.above_bytes) / 1e6:,.0f}"


def _pixels(result: Result, workload: Workload) -> str:
    ((_, height, width),) = workload.grid
    patch = EncoderConfig(**result.model["config"]).patch_size
    return f"{width * patch:,} x {height * patch:,} pixels ({workload.patches:,} patches)"


def _answer(result: Result) -> list[str]:
    """Which side is the fastest for one photograph: the sentence that most readers came for."""
    workload = result.photograph
    machine, precision = result.machine, result.model["precision"]
    if workload is None:
        return [f"Times of {len(result.sides)} sides on {machine['cpus']} CPUs ({machine['cpu']})."]
    rows = result.fastest_first(workload)
    (fastest, seconds), (slowest, longest) = rows[0], rows[-1]
    said = [
        f"**{result.label(fastest)} is the fastest: {seconds:.3g} s for one photograph of {_pixels(result, workload)} on "
        f"{machine['cpus']} CPUs ({machine['cpu']}).**"
    ]
    exact = [row for row in rows if _is_exact(result, row[0])]
    if exact and exact[0][0] != fastest:
        said.append(
            f"Of the sides in {precision}, {result.label(exact[0][0])} is the fastest with {exact[0][1]:.3g} s."
        )
    if slowest not in (fastest, exact[0][0] if exact else None):
        said.append(f"The slowest is {result.label(slowest)} with {longest:.3g} s.")
    layers = result.model["config"]["num_hidden_layers"]
    released = EncoderConfig().num_hidden_layers
    if layers < released:
        said.append(f"The model of these figures has {layers} of the {released} released layers.")
    return [" ".join(said)]


def _bars_in_words(result: Result) -> str:
    if result.photograph is None:
        return ""
    rows = result.fastest_first(result.photograph)
    named = ", ".join(f"{result.label(side)} {seconds:.3g}" for side, seconds in rows)
    return f"Bars: seconds for one photograph of {result.photograph.patches:,} patches. {named}."


def _circumstances(result: Result) -> list[str]:
    machine, config = result.machine, result.model["config"]
    lines = [
        f"Measured with `mmvision benchmark` on {_date(machine['date'])}: {machine['cpus']} CPUs ({machine['cpu']}), "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}, Python {machine['python']}, mmvision-export "
        f"{machine['mmvision-export']}, {result.threads} threads. Every side ran the same weights and inputs in a process of its own. "
        "The sides took turns, and their outputs were compared.",
    ]
    if result.note:
        lines += ["", result.note]
    return [
        *lines,
        "",
        f"The model: {config['num_hidden_layers']} layers of hidden size {config['hidden_size']}, with the projector and patch "
        f"merger to {config['text_hidden_size']}, {result.model['source']} weights, {result.model['precision']}. A patch is a square "
        f"of {config['patch_size']} x {config['patch_size']} pixels. Four patches become one image token of the language model.",
    ]


def _times(result: Result) -> list[str]:
    """The first side on every workload."""
    first = next(iter(result.sides))
    heads = ("workload", "patches", "median, s", "range, s", "runs", "tokens/s", "of peak")
    rows = []
    for workload in result.workloads:
        ours = result.of(first, workload.name)
        if ours is None:
            continue
        share = result.flops(workload) / ours.median / 1e9 / result.gemm_peak_gflops
        tokens = workload.patches / result.model["patches_per_token"] / ours.median
        rows.append(
            (
                workload.name.removesuffix(" patches"),  # the next column says so
                f"{workload.patches:,}",
                f"{ours.median:.3g}",
                "-"
                if len(ours.seconds) == 1
                else f"{min(ours.seconds):.3g} to {max(ours.seconds):.3g}",
                str(len(ours.seconds)) if ours.warm else "cold",
                f"{tokens:.0f}",
                f"{share:.0%}",
            )
        )
    return [
        f"The times of {result.label(first)}. *Tokens* are image tokens. *Cold* is one run, with no run before to warm up. *Of peak* "
        "is the share of the [fastest product](#share-of-the-peak).",
        "",
        *_table(heads, rows),
    ]


def _notes(result: Result) -> list[str]:
    """What a reader of the tables of times has to know."""
    notes = []
    if {entry.partition(": ")[0] for entry in result.skipped} & set(MAX_PATCHES):
        notes.append("A dash: not run, because its dense attention would not fit.")
    if emulated := [result.label(name) for name in result.emulated()]:
        notes.append(
            "This CPU has no products of bfloat16. PyTorch emulates them, which takes several times as long as float32. "
            f"These sides ran once a workload, and up to {EMULATED_MAX_PATCHES:,} patches: {'; '.join(emulated)}."
        )
    refused = dict.fromkeys(entry.rpartition(": ")[0] for entry in result.refused)
    for side in refused:
        notes += [f"A dash: {result.label(side)} refused the workload before it began, and said why:", ""]  # fmt: skip
        for entry, said in result.refused.items():
            refuser, _, workload = entry.rpartition(": ")
            if refuser == side:
                notes.append(f"* {workload}: {said}.")
    return ["", *notes] if notes else []


def _disturbance(result: Result) -> list[str]:
    rows = [(m.foreign_cpus, m) for m in result.measurements if m.foreign_cpus is not None]
    disturbed = [row for row in rows if row[0] > _DISTURBED_CPUS]
    if not disturbed:
        return []
    most, worst = max(disturbed, key=lambda row: row[0])
    return [
        "",
        f"**The machine was not quiet**: in {len(disturbed)} of {len(result.measurements)} measurements other processes used "
        f"more than a tenth of a CPU, at most {most:.1f} CPUs ({result.label(worst.side)}, {worst.workload}). A ratio suffers less "
        "than a time, because both sides of a round were disturbed alike. Measure again on a quiet machine.",
    ]


def _accuracy(result: Result) -> list[str]:
    """What the sides in fewer bits than the model's lose, measured on every workload they ran."""
    precision = result.model["precision"]
    rows = []
    for name in result.sides:
        found = [m for m in result.measurements if m.side == name]
        if found and not _is_exact(result, name):
            cosine, distance = min(m.min_cosine for m in found), max(m.relative_l2 for m in found)
            rows.append((result.label(name), f"{cosine:.6f}", f"{distance:.1e}"))
    if not rows:
        return []
    return [
        "",
        "## Accuracy: what fewer bits cost",
        "",
        f"Every image token was compared with the first side in {precision}. The table has the least cosine similarity and the "
        "largest relative L2 distance over all workloads.",
        "",
        *_table(("side", "least cosine", "largest relative L2"), rows),
    ]


def _sides(result: Result) -> list[str]:
    rows = [
        (
            result.label(name),
            str(facts["version"]),
            f"{facts['open_s']:.1f} s",
            f"{facts['rss_bytes'] / 1e9:.2f} GB",
        )
        for name, facts in result.sides.items()
    ]
    heads = ("side", "version", "time to open", "memory once open")
    peers = [name for name in result.sides if name in PEERS]
    command = ["mmvision benchmark"]
    if result.workload_set != "standard":
        command.append(f"--{result.workload_set}")
    command += [f"--backend {name}" for name in result.sides if name not in PEERS]
    if peers:
        command.append(f"--against {','.join(peers)}")
    return [
        *_table(heads, rows, words=2),
        "",
        "The same comparison on your machine:",
        "",
        "```",
        " ".join(command),
        "```",
    ]
