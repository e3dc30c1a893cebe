"""The `mmvision` command: each subcommand is a signature, a docstring and one call.

Heavy packages are imported by the command that uses them, so that `mmvision --help` answers at
once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from mmvision_export.cli.benchmark import benchmark
from mmvision_export.cli.build import build_engine, build_plugins
from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.export import ExportCommand, export
from mmvision_export.cli.options import Verbose, the_model
from mmvision_export.cli.quantize import quantize
from mmvision_export.cli.verify_gpu import verify_gpu
from mmvision_export.core.command import exit_code_of, print_failure
from mmvision_export.core.errors import print_error
from mmvision_export.version import __version__

__all__ = ["app", "main"]

# Which extra brings a package that a command turned out to need.
_EXTRA_OF = {
    "torch": "export",
    "huggingface_hub": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
}


app = typer.Typer(
    name="mmvision",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: at 80 columns the boxed one cuts option names short.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take the MiniMax-M3-VL vision encoder from a PyTorch checkpoint to an engine that is the same function.",
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(cls=ExportCommand)(export)


@app.command()
def parity(
    model: Annotated[
        Optional[Path],
        typer.Option(
            "--model",
            metavar="DIR|ENGINE",
            help="Model directory, or one engine in its plans/. Default: the only one in engines/.",
        ),
    ] = None,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(
            metavar="DIR|HUB_ID", help="Where the weights are. Default: where they were at export."
        ),
    ] = None,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="FILE", help="Image to compare on; may be repeated, for one packed batch."
        ),
    ] = None,
    pixel_values: Annotated[
        Optional[Path],
        typer.Option(
            metavar="NPY", help="Patches [num_patches, 1176] to compare on, with --grid-thw."
        ),
    ] = None,
    grid_thw: Annotated[
        Optional[Path],
        typer.Option(metavar="NPY", help="Integers [num_images, 3]: t, h, w in patches."),
    ] = None,
    kernel_library: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="Compare onnxruntime-amx too, with what build-plugins --cpu built.",
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Open engines of the directory that you have not built here too: they are "
            "executable content.",
        ),
    ] = False,
    report: Annotated[
        Optional[Path],
        typer.Option(
            metavar="HTML",
            help="Write a report with plots here, and all numbers as .json beside it.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the report if it exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how far graphs and engines are from PyTorch in float64.

    Every graph of the model directory, and the engines that fit this machine, on the images or
    patches given, or on grids of every kind; and layer by layer on the worst of them. A summary is
    written into manifest.json. Exits with 1 if a difference is beyond its gate, or a value is not
    finite.
    """
    if (pixel_values is None) != (grid_thw is None):
        raise typer.BadParameter("--pixel-values and --grid-thw go together")
    if image and pixel_values:
        raise typer.BadParameter("give either --image or --pixel-values with --grid-thw")

    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.cli.parity_output import print_parity, samples_from_options
    from mmvision_export.models.weights import WeightSource
    from mmvision_export.parity.check import check_parity, directory_from_path
    from mmvision_export.parity.report.page import (
        checked_report_path,
        record_from_parity,
        write_report,
    )
    from mmvision_export.parity.result import record_parity

    path = the_model(model)
    if report is not None:
        checked_report_path(report, force=force)
    directory = directory_from_path(path)
    manifest = Manifest.read(directory)
    samples = samples_from_options(
        directory, manifest, images=image or (), pixel_values=pixel_values, grid_thw=grid_thw
    )
    source = WeightSource(checkpoint=checkpoint) if checkpoint else None
    with progress_display() as progress:
        result = check_parity(
            path,
            manifest=manifest,
            source=source,
            samples=samples,
            kernel_library=kernel_library,
            trust=trust,
            progress=progress,
        )
    if as_json:
        print(json.dumps(record_from_parity(result), indent=2))
    else:
        print_parity(result)
    record_parity(result)
    if report is not None:
        write_report(report, result, force=force)
        messages.print(f"report: {report}", markup=False)
    for row in result.rows:
        for failure in row.failures:
            print_error(f"{row.runner}, {row.sample}: {failure}")
    if not result.passed:
        raise typer.Exit(1)


app.command()(quantize)
app.command("build-plugins")(build_plugins)
app.command("build-engine")(build_engine)
app.command()(benchmark)
app.command("verify-gpu")(verify_gpu)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def run(context: typer.Context) -> None:
    """Encode images or a video, and print a summary as JSON."""
    from mmvision_export.run import main as run_main

    # It has printed its own errors; SystemExit passes typer and `main` below.
    sys.exit(run_main(context.args, prog="mmvision run"))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="Model directory, .onnx graph or .engine.")
    ],
    verbose: Verbose = False,
) -> None:
    """Describe a model directory, graph or engine.

    Inputs, operators, sizes, precision, versions and what was checked, as JSON. Of a model
    directory every file is hashed and compared with the manifest.
    """
    from mmvision_export.graph.inspection import inspect as describe

    print(json.dumps(describe(path), indent=2))


@app.command()
def doctor(
    model: Annotated[
        Optional[Path],
        typer.Option(
            "--model", metavar="DIR", help="Model directory to choose a backend for, by opening it."
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show which backends work here, and why others do not, fastest first.

    With --model, also which of them --backend auto takes for a model directory, and why it passes
    over others.
    """
    from mmvision_export.cli.examination import choice_for, examine

    report = examine()
    table = Table(box=None, show_header=False)
    for name, version in report.packages.items():
        table.add_row(name, version or "-", style=None if version else "dim")
    console.print(table)
    console.print(f"\n[bold]CUDA driver[/]\n  {escape(report.driver)}")
    for row in report.backends:
        console.print(
            f"\n[bold]{row.name}[/]\n  build engines: {escape(row.builds)}\n  run: {escape(row.runs)}"
        )
    if model is not None:
        console.print(f"\n[bold]auto, for {escape(str(model))}[/]")
        for name, reason in choice_for(model).items():
            console.print(f"  {name}: {escape(reason)}")


def main() -> None:
    """Entry point: runs the command and turns its errors into messages and exit codes."""
    sys.exit(exit_code_of(_run_app, verbose="--verbose" in sys.argv, on_error=_answer))


def _run_app() -> int:
    # Not standalone: typer's own handling would print errors of usage and interrupts in its own
    # ways. It answers a KeyboardInterrupt by the code of an interrupted command.
    code = app(standalone_mode=False)
    return code if isinstance(code, int) else 0


def _answer(error: Exception) -> int:
    """Print an error and give its exit code."""
    if hasattr(error, "format_message"):  # wrong usage; the class is one that typer keeps to itself
        command = getattr(getattr(error, "ctx", None), "command_path", "mmvision")
        print_error(error.format_message(), f"{command} --help")
        return 2
    if isinstance(error, ImportError) and error.name is not None:
        package = error.name.partition(".")[0]
        print_error(
            f"{package} is not installed", f"pip install '.[{_EXTRA_OF.get(package, 'parity')}]'"
        )
        return 1
    return print_failure(error)
