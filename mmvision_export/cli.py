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
from typing import Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from mmvision_export import __version__
from mmvision_export.cli_quantize import quantize
from mmvision_export.console import console, messages, progress_display
from mmvision_export.errors import message_and_hint, print_error
from mmvision_export.manifest import find_model_directory

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
    shallow = "shallow"
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


class Attention(str, enum.Enum):
    """How an engine does attention."""

    auto = "auto"
    plugin = "plugin"
    native = "native"
    packed = "packed"


class Machine(str, enum.Enum):
    """CPU of a plugin library."""

    x86_64 = "x86_64"
    aarch64 = "aarch64"


ModelOption = Annotated[
    Optional[Path], typer.Option("--model", metavar="DIR", help="Model directory. Default: the only one in engines/.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


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
        typer.Option(metavar="DIR|HUB_ID", help="Where the weights are. Default: where they were at export."),
    ] = None,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="FILE", help="Image to compare on; may be repeated, for one packed batch."),
    ] = None,
    pixel_values: Annotated[
        Optional[Path], typer.Option(metavar="NPY", help="Patches [num_patches, 1176] to compare on, with --grid-thw.")
    ] = None,
    grid_thw: Annotated[
        Optional[Path], typer.Option(metavar="NPY", help="Integers [num_images, 3]: t, h, w in patches.")
    ] = None,
    report: Annotated[
        Optional[Path],
        typer.Option(metavar="HTML", help="Write a report with plots here, and all numbers as .json beside it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the report if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how far graphs and engines are from PyTorch in float64.

    Every graph of the model directory, and the engines that fit this machine, on the images or patches given, or on
    grids of every kind; and layer by layer on the worst of them. A summary is written into manifest.json. Exits with 1
    if a difference is beyond its gate, or a value is not finite.
    """
    if (pixel_values is None) != (grid_thw is None):
        raise typer.BadParameter("--pixel-values and --grid-thw go together")
    if image and pixel_values:
        raise typer.BadParameter("give either --image or --pixel-values with --grid-thw")

    from mmvision_export.parity import check_parity, record_parity
    from mmvision_export.report.page import checked_report_path, record_from_parity, write_report
    from mmvision_export.report.terminal import print_parity, samples_from_options
    from mmvision_export.weights import WeightSource

    path = _model(model)
    if report is not None:
        checked_report_path(report, force=force)
    samples = samples_from_options(path, images=image or (), pixel_values=pixel_values, grid_thw=grid_thw)
    source = WeightSource(checkpoint=checkpoint) if checkpoint else None
    with progress_display() as progress:
        result = check_parity(path, source=source, samples=samples, progress=progress)
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


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} must be integers with commas between, got {text!r}") from None


app.command()(quantize)


@app.command("build-plugins")
def build_plugins(
    sm: Annotated[
        Optional[list[int]],
        typer.Option(
            metavar="CC",
            help="GPU to compile for, as 87 for Orin; may be repeated. Default: all from 80 (Ampere) to 120.",
        ),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],
        typer.Option(metavar="D", help="Head size of the attention kernel; may be repeated. Default: all, 16 to 128."),
    ] = None,
    machine: Annotated[
        Optional[Machine],
        typer.Option(help="CPU the library will run on. Default: this one's; another is cross-compiled."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(metavar="DIR", help="Folder for the library. Default: engines/plugins/ and the CPU."),
    ] = None,
    tensorrt_include: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            envvar="TENSORRT_INCLUDE_DIR",
            help="Folder with NvInferRuntime.h, of TensorRT 10.0 or later. Default: where TensorRT or JetPack puts it.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the library if it exists.")] = False,
    verbose: Verbose = False,
) -> None:
    """Build libmmvision_plugins.so, which makes TensorRT's attention cost what the images cost one by one.

    It serves the major version of TensorRT whose headers it is compiled with, 10 or 11, and every GPU it has kernels
    for. No GPU and no CUDA toolkit is needed: CMake, g++, TensorRT's headers, and Triton for the kernels. All kernels
    take two minutes on two cores.
    """
    from mmvision_export.plugin_build.library import build_plugins as build

    with progress_display() as progress:
        library, record = build(
            sms=sm or (),
            head_dims=head_dim or (),
            machine=None if machine is None else machine.value,
            output=output,
            tensorrt_include=tensorrt_include,
            force=force,
            progress=progress,
        )
    console.print(
        f"{library}: {record.machine}, {record.library.size_bytes / 1e6:.1f} MB, compute capability "
        f"{', '.join(str(sm / 10) for sm in record.sms)}, head_dim {', '.join(map(str, record.head_dims))}; "
        f"what each kernel uses: {library.parent / 'kernels.md'}",
        markup=False,
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
    attention: Annotated[
        Attention,
        typer.Option(
            help="plugin: our kernels, for TensorRT. packed: TensorRT 11's own. native: one masked product, which "
            "costs the square of the whole batch. auto: plugin where it can be, else native."
        ),
    ] = Attention.auto,
    plugin_library: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="libmmvision_plugins.so. Default: where build-plugins puts it."),
    ] = None,
    buckets: Annotated[
        Optional[str],
        typer.Option(
            metavar="N,N,...",
            help="Sizes in patches, each with a profile of its own that batches are padded to, as "
            "256,1024,2304,4096. Instead of --min-, --opt- and --max-patches.",
        ),
    ] = None,
    min_patches: Annotated[Optional[int], typer.Option(help="Fewest patches of a batch. Default: 4.")] = None,
    opt_patches: Annotated[
        Optional[int], typer.Option(help="Patches the kernels are chosen for. Default: 1024, or the maximum if less.")
    ] = None,
    max_patches: Annotated[
        Optional[int], typer.Option(help="Most patches of a batch, all images together. Default: 4096.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Most images of a launch.")] = 64,
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
    from mmvision_export.buckets import profiles_from_buckets
    from mmvision_export.engine import build_engine as build
    from mmvision_export.manifest import Manifest
    from mmvision_export.sidecar import Profile

    sizes = [min_patches, opt_patches, max_patches]
    if buckets is not None and sizes != [None, None, None]:
        raise typer.BadParameter("--buckets goes without --min-patches, --opt-patches and --max-patches")
    directory = _model(model)
    if buckets is not None:
        profiles = profiles_from_buckets(_integers("--buckets", buckets), max_images, Manifest.read(directory).config)
    else:
        most = 4096 if max_patches is None else max_patches
        profiles = [
            Profile(
                min_patches=4 if min_patches is None else min_patches,
                opt_patches=min(1024, most) if opt_patches is None else opt_patches,
                max_patches=most,
                max_images=max_images,
            )
        ]
    with progress_display() as progress:
        engine, record = build(
            directory,
            profiles=profiles,
            precision=_precision(fp16=fp16, int8=int8, fp8=fp8),
            backend=backend.value,
            compute_capabilities=compute_capability or (),
            attention=attention.value,
            plugin_library=plugin_library,
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
def benchmark(
    model: ModelOption = None,
    backend: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAME[:GRAPH]",
            help="Backend to measure, or one graph of the directory in it, as onnxruntime-cpu:model.onnx; may be "
            "repeated. The others are compared with the first. Default: onnxruntime-cpu.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Graphs of onnxruntime-cpu: fp32, int8, or both with a comma between.")
    ] = "fp32",
    against: Annotated[
        str,
        typer.Option(
            metavar="PEERS",
            help="transformers-eager, transformers-sdpa, nemo, torch-eager, torch-compile; commas between.",
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small batches, for CI.")] = False,
    threads: Annotated[Optional[int], typer.Option(help="Of each side. Default: all CPUs.", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Most runs of each side on a workload.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Time for one workload, all sides together.", min=0)] = 60,
    output: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR", help="Folder for results.json and the plots. Default: benchmark/ in the current folder."
        ),
    ] = None,
    page: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE.md", help="Write a page about it too, with its plots in a folder of the same stem."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure backends, and PyTorch implementations of others, side by side.

    Every side has the same weights, inputs and threads, and a process of its own; they take turns. What is measured is
    kept after each workload, so that an interrupt loses only the last.
    """
    from mmvision_export.benchmark.run import run_benchmark

    with progress_display() as progress:
        result, folder = run_benchmark(
            _model(model),
            backends=backend or ["onnxruntime-cpu"],
            precisions=[name.strip() for name in precision.split(",") if name.strip()],
            peers=[name.strip() for name in against.split(",") if name.strip()],
            workloads="quick" if quick else "standard",
            threads=threads,
            repeats=repeats,
            seconds_per_workload=seconds,
            output=output or Path("benchmark"),
            page=page,
            progress=progress,
        )
    first, *others = result.sides
    table = Table(box=None, header_style="bold")
    for title in ("workload", f"{first}, ms", "range", "of peak", *(f"x {other}" for other in others)):
        table.add_column(title, justify="left" if title == "workload" else "right")
    for workload in result.workloads:
        if (ours := result.of(first, workload.name)) is None:
            continue
        share = result.flops(workload) / ours.median / 1e9 / result.gemm_peak_gflops
        ratios = [result.ratio(other, workload.name) for other in others]
        spread = f"{1e3 * min(ours.seconds):.0f} to {1e3 * max(ours.seconds):.0f}"
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(workload.name, f"{1e3 * ours.median:.0f}", spread, f"{share:.0%}", *cells)
    console.print(table, width=max(console.width, 60 + 22 * len(result.sides)))
    console.print(f"{folder}: results.json and plots", markup=False)


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
def doctor(
    model: Annotated[
        Optional[Path],
        typer.Option("--model", metavar="DIR", help="Model directory to choose a backend for, by opening it."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show which backends work here, and why others do not, fastest first.

    With --model, also which of them --backend auto takes for a model directory, and why it passes over others.
    """
    from mmvision_export.doctor import choice_for, examine

    report = examine()
    table = Table(box=None, show_header=False)
    for name, version in report.packages.items():
        table.add_row(name, version or "-", style=None if version else "dim")
    console.print(table)
    for row in report.backends:
        console.print(f"\n[bold]{row.name}[/]\n  build engines: {escape(row.builds)}\n  run: {escape(row.runs)}")
    if model is not None:
        console.print(f"\n[bold]auto, for {escape(str(model))}[/]")
        for name, reason in choice_for(model).items():
            console.print(f"  {name}: {escape(reason)}")


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
