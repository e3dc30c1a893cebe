"""The `mmvision benchmark` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, progress_display
from mmvision_export.cli.options import AsJson, ModelOption, Quiet, Verbose, print_json, the_model
from mmvision_export.core.errors import BenchmarkError

if TYPE_CHECKING:
    from mmvision_export.benchmark.result import Result

__all__ = ["benchmark"]


@examples(
    "mmvision benchmark --backend onnxruntime-cpu openvino --against transformers-sdpa",
    "mmvision benchmark --precision fp32,int8 --page speed.md",
    "mmvision benchmark --results benchmark/results.json --page speed.md --force",
)
def benchmark(
    model: ModelOption = None,
    backend: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAME[:GRAPH]",
            help="Backend to measure. NAME:GRAPH takes one graph of the directory, as "
            "onnxruntime-cpu:model.onnx; openvino-bf16 computes in bfloat16. Takes several "
            "values; the others are compared with the first. Default: onnxruntime-cpu.",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Graphs of onnxruntime-cpu: fp32, int8, or both with a comma between.",
        ),
    ] = "fp32",
    against: Annotated[
        str,
        typer.Option(
            metavar="PEERS",
            help="PyTorch implementations to compare with, commas between: transformers-eager, "
            "transformers-sdpa, nemo, torch-eager, torch-compile; in bfloat16 "
            "transformers-sdpa-bf16, torch-eager-bf16, torch-compile-bf16.",
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small batches, for CI.")] = False,
    photographs: Annotated[
        bool,
        typer.Option("--photographs", help="Images of 4,096 to 65,536 patches; takes an hour."),
    ] = False,
    threads: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Threads of each side. Default: all CPUs.", min=1),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Most runs of each side on a workload.", min=1)
    ] = 5,
    seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Time for one workload, all sides together.", min=0),
    ] = 60,
    output: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            help="Folder for results.json and the charts. Default: benchmark/ in the current folder.",
        ),
    ] = None,
    page: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE.md",
            help="Write a page too. Its charts and results.json go into a folder of the same stem.",
        ),
    ] = None,
    results: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE.json",
            help="Write the page of this results.json again, and measure nothing.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace results and a page that exist.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure backends and PyTorch side by side.

    Every side has the same weights, inputs and threads, and a process of its own. The sides take
    turns. The command keeps the results after each workload, so an interrupt loses only the last
    workload.
    """
    if quick and photographs:
        raise BenchmarkError(
            "--quick and --photographs exclude each other", hint="give one of them"
        )
    if results is not None and (page is None or output is not None):
        raise BenchmarkError(
            "--results goes with --page, and without --output",
            hint="mmvision benchmark --results benchmark/results.json --page speed.md",
        )
    from mmvision_export.benchmark.run import page_from_file, run_benchmark

    if results is not None and page is not None:
        result = page_from_file(results, page, force=force)
        if as_json:
            print_json({"kind": "benchmark", "path": page, **result.to_dict()})
        else:
            console.print(f"{page}: written from {results}", markup=False)
        return
    with progress_display() as progress:
        result, folder = run_benchmark(
            the_model(model),
            backends=backend or ["onnxruntime-cpu"],
            precisions=[name.strip() for name in precision.split(",") if name.strip()],
            peers=[name.strip() for name in against.split(",") if name.strip()],
            workloads="quick" if quick else "photographs" if photographs else "standard",
            threads=threads,
            repeats=repeats,
            seconds_per_workload=seconds,
            output=output or Path("benchmark"),
            page=page,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({"kind": "benchmark", "path": folder, **result.to_dict()})
        return
    _print_table(result)
    console.print(f"{folder}: results.json and charts", markup=False)


def _print_table(result: Result) -> None:
    first, *others = result.sides
    title = f"{result.label(first)}: median milliseconds of one run, their range, share of the peak"
    if others:
        title += "; the others: how many times as long they take (above 1: slower)"
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for title in (
        "workload",
        f"{result.label(first)}, ms",
        "range",
        "of peak",
        *(f"x {result.label(other)}" for other in others),
    ):
        table.add_column(title, justify="left" if title == "workload" else "right")
    for workload in result.workloads:
        if (ours := result.of(first, workload.name)) is None:
            continue
        share = result.flops(workload) / ours.median / 1e9 / result.gemm_peak_gflops
        ratios = [result.ratio(other, workload.name) for other in others]
        spread = f"{1e3 * min(ours.seconds):.0f} to {1e3 * max(ours.seconds):.0f}"
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(workload.name, f"{1e3 * ours.median:.0f}", spread, f"{share:.0%}", *cells)
    # Not folded to a width that a pipe has not: a terminal may fold it.
    Console(width=max(console.width, 60 + 30 * len(result.sides))).print(table)
