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

from mmvision_export.cli.benchmark import benchmark
from mmvision_export.cli.build import build_engine, build_plugins
from mmvision_export.cli.build_model import build
from mmvision_export.cli.bundle import bundle
from mmvision_export.cli.command import (
    MmvisionCommand,
    OptionalValueCommand,
    add_command,
    examples,
)
from mmvision_export.cli.console import messages, progress_display
from mmvision_export.cli.doctor import doctor
from mmvision_export.cli.embed import embed
from mmvision_export.cli.export import export
from mmvision_export.cli.inspect import inspect
from mmvision_export.cli.lower import lower
from mmvision_export.cli.options import Quiet, Verbose, the_model
from mmvision_export.cli.quantize import quantize
from mmvision_export.cli.triton_repository import triton_repository
from mmvision_export.cli.verify import verify
from mmvision_export.cli.verify_gpu import verify_gpu
from mmvision_export.core.atomic import refuse_unwritable
from mmvision_export.core.command import exit_code_of, print_failure
from mmvision_export.core.errors import print_error
from mmvision_export.core.install import install_command
from mmvision_export.version import __version__

__all__ = ["app", "main"]

# Which extra brings a package that a command turned out to need.
_EXTRA_OF = {
    "torch": "export",
    "huggingface_hub": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "pyarrow": "embed",
    "ray": "ray",
}


app = typer.Typer(
    name="mmvision",
    # --install-completion and --show-completion
    add_completion=True,
    pretty_exceptions_enable=False,
    # Plain help: at 80 columns the boxed one cuts option names short.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take the MiniMax-M3-VL vision encoder from a PyTorch checkpoint to an engine that computes "
    "the same function.",
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


add_command(app, "build", build, cls=OptionalValueCommand)
add_command(app, "export", export, cls=OptionalValueCommand)


@app.command(cls=MmvisionCommand)
@examples(
    "mmvision parity --model engines/tiny",
    "mmvision parity --image a.jpg b.jpg --report accuracy.html",
)
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
            metavar="DIR|HUB_ID", help="Where the weights are. Default: the source of the export."
        ),
    ] = None,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="FILE|FOLDER",
            help="Images to compare on: files, folders, quoted patterns. They are packed into few batches.",
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
            help="Also compare onnxruntime-amx with this library, built by build-plugins --cpu.",
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Also open engines of the directory that you have not built here. Engines are executable content.",
        ),
    ] = False,
    report: Annotated[
        Optional[Path],
        typer.Option(
            metavar="HTML",
            help="Write a report with plots here, and all its numbers as .json beside it.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the report if it exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare graphs and engines with PyTorch in float64.

    The command compares every graph of the model directory, and every engine that fits this machine.
    It uses the images or patches that you give, or random pixels in grids of every kind. It
    compares the worst input layer by layer. It writes a summary into manifest.json. It exits with 1 if a
    difference is beyond its gate, or if a value is not finite.
    """
    if (pixel_values is None) != (grid_thw is None):
        raise typer.BadParameter("--pixel-values and --grid-thw go together")
    if image and pixel_values:
        raise typer.BadParameter("give either --image or --pixel-values with --grid-thw")

    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.cli.parity_output import (
        print_parity,
        samples_from_options,
        standing_lines,
    )
    from mmvision_export.models.weights import WeightSource
    from mmvision_export.parity.advice import next_step
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
    refuse_unwritable(directory)  # it takes the verdict
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
    recorded = record_parity(result)
    if report is not None:
        write_report(report, result, force=force)
        messages.print(f"report: {report}", markup=False)
    for line in standing_lines(result, recorded):
        messages.print(f"[yellow]warning[/]: {escape(line)}")
    failures = [
        f"{row.runner}, {row.sample}: {each}" for row in result.rows for each in row.failures
    ]
    for failure in failures:
        print_error(failure, next_step(result) if failure == failures[-1] else None)
    if not result.passed:
        raise typer.Exit(1)


add_command(app, "quantize", quantize)
add_command(app, "build-plugins", build_plugins)
add_command(app, "build-engine", build_engine)
add_command(app, "lower", lower)
add_command(app, "benchmark", benchmark)
add_command(app, "verify-gpu", verify_gpu)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def run(context: typer.Context) -> None:
    """Encode images, a folder of images, or a video."""
    from mmvision_export.run import main as run_main

    # It has printed its own errors; SystemExit passes typer and `main` below.
    sys.exit(run_main(context.args, prog="mmvision run"))


add_command(app, "embed", embed)
add_command(app, "triton-repository", triton_repository)
add_command(app, "bundle", bundle)
add_command(app, "verify", verify)
add_command(app, "inspect", inspect)
add_command(app, "doctor", doctor)


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
            f"{package} is not installed", install_command(_EXTRA_OF.get(package, "parity"))
        )
        return 1
    return print_failure(error)
