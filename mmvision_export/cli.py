"""The `mmvision` command: each subcommand is a signature, a docstring and one call.

Heavy packages are imported by the command that uses them, so that `mmvision --help` answers at once.
"""

from __future__ import annotations

import enum
import itertools
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from mmvision_export import __version__
from mmvision_export.cli_quantize import quantize
from mmvision_export.console import console, messages, progress_display
from mmvision_export.errors import message_and_hint, print_error
from mmvision_export.manifest import find_model_directory

if TYPE_CHECKING:
    from mmvision_export.parity import ParityResult

__all__ = ["app", "main"]

HUB_CHECKPOINT = "MiniMaxAI/MiniMax-M3"

_INTERRUPTED = 130

# Which extra brings a package that a command turned out to need.
_EXTRA_OF = {"torch": "export", "huggingface_hub": "export", "onnxscript": "export", "onnxruntime": "cpu"}


app = typer.Typer(
    name="mmvision",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: at 80 columns the boxed one cuts option names short.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take the MiniMax-M3-VL vision encoder from a PyTorch checkpoint to an engine that is the same function.",
)


class Preset(str, enum.Enum):
    """Dimensions for random weights."""

    tiny = "tiny"
    full = "full"


class RandomWeights(str, enum.Enum):
    """Kinds of random weights."""

    plain = "plain"
    outliers = "outliers"


class Backend(str, enum.Enum):
    """TensorRT to build with."""

    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


ModelOption = Annotated[
    Optional[Path], typer.Option("--model", metavar="DIR", help="Model directory. Default: the only one in engines/.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


app.command()(quantize)


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


def _precision(**given: bool) -> str | None:
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of --{', --'.join(chosen)}")
    return chosen[0] if chosen else None


def _model(given: Path | None) -> Path:
    model = find_model_directory(given)
    if given is None:
        messages.print(f"model: {model}", markup=False)
    return model


class _ExportCommand(TyperCommand):
    """Reads `--random-weights` with no value as `--random-weights=plain`; typer has no options with optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flag = "--random-weights"
        given = [
            f"{flag}=plain" if argument == flag and (following is None or following.startswith("-")) else argument
            for argument, following in itertools.zip_longest(args, args[1:])
        ]
        return super().parse_args(ctx, given)


@app.command(cls=_ExportCommand)
def export(
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write ONNX, the only format so far.", show_default=False)
    ] = True,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(metavar="DIR|HUB_ID", help=f"Checkpoint folder or hub id. Default: {HUB_CHECKPOINT}."),
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
    preset: Annotated[
        Optional[Preset], typer.Option(help="Dimensions for --random-weights: tiny (7 M parameters) or full (865 M).")
    ] = None,
    random_weights: Annotated[
        Optional[RandomWeights],
        typer.Option(
            metavar="[plain|outliers]",
            help="Seeded random weights instead of a checkpoint: plain (also with no value), or with the outlier "
            "channels and massive activations of trained vision transformers.",
        ),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of the random weights. Default: 0.", min=0)] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR", help="Model directory to make. Default: engines/ and the name of the checkpoint or preset."
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32 graph (default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 graph.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 graph, with float32 input and output.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23. Below 23, attention is MatMul and Softmax.")] = 23,
    force: Annotated[bool, typer.Option("--force", help="Replace the model directory if it exists.")] = False,
    verbose: Verbose = False,
) -> None:
    """Export the encoder to ONNX, into a new model directory."""
    precision = _precision(fp32=fp32, fp16=fp16, bf16=bf16) or "fp32"
    if random_weights and (checkpoint or revision):
        raise typer.BadParameter("--random-weights takes no --checkpoint or --revision")
    if random_weights and preset is None:
        raise typer.BadParameter("--random-weights needs --preset tiny or --preset full")
    if (preset or seed is not None) and not random_weights:
        raise typer.BadParameter("--preset and --seed go with --random-weights")
    if checkpoint == "":
        raise typer.BadParameter("--checkpoint is empty")

    from mmvision_export.onnx_export import export_model_directory
    from mmvision_export.weights import WeightSource

    if preset is not None and random_weights is not None:
        source = WeightSource.random(preset.value, seed or 0, random_weights.value)
        output = output or Path("engines") / preset.value
    else:
        source = WeightSource(checkpoint=checkpoint or HUB_CHECKPOINT, revision=revision)
        output = output or Path("engines") / Path(checkpoint or HUB_CHECKPOINT).resolve().name
    with progress_display() as progress:
        manifest = export_model_directory(
            source, output, precision=precision, opset=opset, force=force, progress=progress
        )
    size = sum(record.size_bytes for record in manifest.files.values())
    console.print(f"{output}: {precision} graph, opset {manifest.opset}, {size / 1e6:.1f} MB", markup=False)
    messages.print(f"next: mmvision parity --model {output}", markup=False)


@app.command()
def parity(
    model: ModelOption = None,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(metavar="DIR|HUB_ID", help="Where the weights are. Default: where they were at export."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compare graphs and engines with PyTorch in float64.

    Every graph of the model directory, and the engines that fit this machine, on grids of every kind. The result is
    written into manifest.json. Exits with 1 if a difference is beyond its gate.
    """
    from mmvision_export.parity import GATES, check_parity, record_parity
    from mmvision_export.weights import WeightSource

    directory = _model(model)
    source = WeightSource(checkpoint=checkpoint) if checkpoint else None
    with progress_display() as progress:
        result = check_parity(directory, source=source, progress=progress)
    if as_json:
        print(json.dumps([row.to_dict() for row in result.rows], indent=2))
    else:
        _print_parity(result)
        for precision in dict.fromkeys(row.precision for row in result.rows):
            console.print(f"{precision} gate: {GATES[precision].describe()}", markup=False)
    record_parity(directory, result)
    for row in result.rows:
        for failure in row.failures:
            print_error(f"{row.runner}, {row.grid}: {failure}")
    if not result.passed:
        raise typer.Exit(1)


def _print_parity(result: ParityResult) -> None:
    console.print(f"{'distance from PyTorch in float64':34}patches  max abs  relative L2  min cosine")
    before = None
    for row in result.rows:
        if row.runner != before:
            console.print(f"[bold]{escape(row.runner)}")
            before = row.runner
        distance, is_torch = row.metrics, row.runner.startswith("pytorch-")
        verdict = "" if is_torch else "[red]FAIL" if row.failures else "[green]pass"
        console.print(
            f"  {row.grid:32}{row.patches:7}  {distance.max_abs:7.1e}  {distance.relative_l2:11.2e}  "
            f"{distance.min_cosine:10.7f}  {verdict}"
        )


@app.command("build-engine")
def build_engine(
    model: ModelOption = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="float16 engine; derived first if the graph is float32.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 engine, from what mmvision quantize made.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 engine, from what mmvision quantize made.")] = False,
    backend: Annotated[
        Backend, typer.Option(help="TensorRT to build with; auto takes the one installed.")
    ] = Backend.auto,
    compute_capability: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="CC",
            help="GPU to build for with TensorRT-RTX, as 8.9 or 89; may be repeated. Default: this machine's GPU, or "
            "without one all that TensorRT-RTX supports.",
        ),
    ] = None,
    min_patches: Annotated[int, typer.Option(help="Fewest patches of a batch.")] = 4,
    opt_patches: Annotated[
        Optional[int], typer.Option(help="Patches the kernels are chosen for. Default: 1024, or the maximum if less.")
    ] = None,
    max_patches: Annotated[int, typer.Option(help="Most patches of a batch, all images together.")] = 4096,
    max_images: Annotated[int, typer.Option(help="Most images of a batch.")] = 64,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Compare a derived fp16 graph first, and refuse one that failed parity."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine of the same name.")] = False,
    verbose: Verbose = False,
) -> None:
    """Build a TensorRT or TensorRT-RTX engine.

    It goes into the model directory's plans/, with a sidecar that says what it is valid for. The precision is the
    graph's own unless --fp16 is given. With the released preprocessing a still image is at most 2304 patches; 4
    patches make one image token.
    """
    from mmvision_export.engine import build_engine as build
    from mmvision_export.sidecar import Profile

    directory = _model(model)
    profile = Profile(
        min_patches=min_patches,
        opt_patches=min(1024, max_patches) if opt_patches is None else opt_patches,
        max_patches=max_patches,
        max_images=max_images,
    )
    with progress_display() as progress:
        engine, record = build(
            directory,
            profile=profile,
            precision=_precision(fp16=fp16, int8=int8, fp8=fp8),
            backend=backend.value,
            compute_capabilities=compute_capability or (),
            check=check,
            force=force,
            progress=progress,
        )
    console.print(
        f"{engine}: {record.precision}, {record.engine.size_bytes / 1e6:.1f} MB, compute capability "
        f"{', '.join(record.compute_capabilities)}, attention: {record.attention}",
        markup=False,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="Model directory, .onnx graph or .engine.")],
    verbose: Verbose = False,
) -> None:
    """Describe a model directory, graph or engine.

    Inputs, operators, sizes, precision, versions and what was checked, as JSON. Of a model directory every file is
    hashed and compared with the manifest.
    """
    from mmvision_export.inspection import inspect as describe

    print(json.dumps(describe(path), indent=2))


@app.command()
def doctor(verbose: Verbose = False) -> None:
    """Show which backends work here, and why others do not."""
    from mmvision_export.doctor import examine

    report = examine()
    table = Table(box=None, show_header=False)
    for name, version in report.packages.items():
        table.add_row(name, version or "-", style=None if version else "dim")
    console.print(table)
    for row in report.backends:
        console.print(f"\n[bold]{row.name}[/]\n  build engines: {escape(row.builds)}\n  run: {escape(row.runs)}")


def main() -> None:
    """Entry point: runs the command and turns its errors into messages and exit codes."""
    verbose = "--verbose" in sys.argv
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # A killed command cleans up what it was writing, as an interrupted one does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        # Not standalone: typer's own handling would print errors of usage and interrupts in its own ways.
        code = app(standalone_mode=False)
        interrupted = interrupted or code == _INTERRUPTED  # typer's answer to KeyboardInterrupt
    except BaseException as error:
        # An interrupt may arrive as the error of a library that was in the middle of something.
        if not (interrupted or isinstance(error, KeyboardInterrupt)):
            if verbose or not isinstance(error, Exception):
                raise
            sys.exit(_answer(error))
        interrupted = True
    if interrupted:
        print_error("interrupted; what was not finished is not kept")
        sys.exit(_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _answer(error: Exception) -> int:
    """Print an error and give its exit code."""
    if hasattr(error, "format_message"):  # wrong usage; the class is one that typer keeps to itself
        command = getattr(getattr(error, "ctx", None), "command_path", "mmvision")
        print_error(error.format_message(), f"{command} --help")
        return 2
    if isinstance(error, ImportError) and error.name is not None:
        package = error.name.partition(".")[0]
        print_error(f"{package} is not installed", f"pip install '.[{_EXTRA_OF.get(package, 'parity')}]'")
        return 1
    print_error(*message_and_hint(error))
    return 1
