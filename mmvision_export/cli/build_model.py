"""The `mmvision build` command: export, parity and engine in one go, by the commands of these names."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.deployment import DEPLOYMENTS, DeploymentName
from mmvision_export.artifacts.manifest import MANIFEST, Manifest, flavour_graph
from mmvision_export.artifacts.verdicts import is_compared
from mmvision_export.cli.build_options import (
    Hardware,
    OptimizationLevel,
    Refit,
    StripWeights,
    TimingCacheFile,
    VersionCompatible,
    WeightStreaming,
    Workspace,
    arguments_from_options,
)
from mmvision_export.cli.command import call, examples
from mmvision_export.cli.console import messages, progress_display
from mmvision_export.cli.export import HUB_CHECKPOINT
from mmvision_export.cli.options import AsJson, Quiet, Verbose, one_precision, print_json
from mmvision_export.core.errors import MmvisionError, OutputError
from mmvision_export.models.minimax_m3_vl.config import Preset
from mmvision_export.models.random_kind import RandomKind

__all__ = ["build"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the three.

    Attributes:
        name: Of the command.
        arguments: What it is called with.
        kept: Why it need not run, or None. Asked when its turn has come.
        prepare: What it needs, made first.
    """

    name: str
    arguments: list[str]
    kept: Callable[[], str | None]
    prepare: Callable[[], None] = lambda: None

    @property
    def line(self) -> str:
        """What a user would type."""
        return shlex.join(["mmvision", self.name, *self.arguments])


@examples(
    "mmvision build --checkpoint ./MiniMax-M3 --fp16 --compute-capability 8.9",
    "mmvision build --checkpoint ./MiniMax-M3 --target cpu --image photos/",
    "mmvision build --preset tiny --random-weights --fp16 --dry-run",
)
def build(
    context: typer.Context,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(
            metavar="DIR|HUB_ID", help=f"Checkpoint folder or hub id. Default: {HUB_CHECKPOINT}."
        ),
    ] = None,
    preset: Annotated[
        Optional[Preset],
        typer.Option(help="Dimensions for --random-weights: tiny, shallow or full."),
    ] = None,
    random_weights: Annotated[
        Optional[RandomKind],
        typer.Option(
            metavar="[plain|outliers]", help="Seeded random weights instead of a checkpoint."
        ),
    ] = None,
    seed: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Seed of the random weights. Default: 0.", min=0),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            help="Model directory. Default: engines/ and the name of the checkpoint or preset.",
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 engine (default).")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32 engine.")] = False,
    target: Annotated[
        Optional[DeploymentName],
        typer.Option(
            help="Where the encoder will run. cpu: no engine. rtx: TensorRT-RTX. dgpu and jetson: "
            "TensorRT, which builds"
            "on the GPU that it builds for. Default: the TensorRT that is installed."
        ),
    ] = None,
    compute_capabilities: Annotated[
        Optional[list[str]],
        typer.Option(
            "--compute-capability",
            metavar="CC",
            help="GPUs to build for with TensorRT-RTX, as 8.9.",
        ),
    ] = None,
    buckets: Annotated[
        Optional[str], typer.Option(metavar="N,N,...", help="Sizes: see mmvision build-engine.")
    ] = None,
    workspace: Workspace = None,
    optimization_level: OptimizationLevel = None,
    timing_cache: TimingCacheFile = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: Hardware = None,
    strip_weights: StripWeights = False,
    refit: Refit = False,
    weight_streaming: WeightStreaming = False,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="FILE|FOLDER",
            help="Images to compare on. Default: random pixels in five grids.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps, and which of them are done.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export, compare and build an engine in one go.

    The command runs export, parity and build-engine, and prints each as you would type it. It keeps
    what is there already: an export of the same weights, verdicts on the same graphs, an engine of the
    same graph and sizes. After a failure or Ctrl-C the same command goes on at the step that failed.
    """
    if random_weights and (checkpoint or preset is None):
        raise typer.BadParameter("--random-weights needs --preset, and takes no --checkpoint")
    if (preset or seed is not None) and not random_weights:
        raise typer.BadParameter("--preset and --seed go with --random-weights")
    options = BuildOptions(
        workspace_bytes=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware=hardware_compatible,
        strip_weights=strip_weights,
        refit=refit,
        weight_streaming=weight_streaming,
    )
    chosen = arguments_from_options(options, timing_cache)
    if target == "cpu" and (fp16 or fp32 or compute_capabilities or buckets or chosen):
        raise typer.BadParameter("--target cpu builds no engine: leave out the engine's options")
    name = preset or Path(checkpoint or HUB_CHECKPOINT).resolve().name
    directory = output or Path("engines") / name
    weights = (
        ["--preset", str(preset), f"--random-weights={random_weights}", "--seed", str(seed or 0)]
        if random_weights
        else ["--checkpoint", checkpoint or HUB_CHECKPOINT]
    )
    model = ["--model", str(directory)]
    precision = one_precision(fp16=fp16, fp32=fp32) or "fp16"
    elsewhere = _elsewhere(target, directory)
    derives = target != "cpu" and precision == "fp16"
    images = [part for path in image or () for part in ("--image", str(path))]
    steps = [
        Step(
            "export",
            ["--onnx", *weights, "--output", str(directory)],
            lambda: _exported(directory, weights),
        ),
        Step(
            "parity",
            [*model, *images],
            lambda: None if image else _compared(directory, derives),
            # So that the graph is compared that the engine is built from.
            prepare=lambda: _derive(directory) if derives else None,
        ),
    ]
    if target != "cpu" and elsewhere is None:
        gpus = [
            part for each in compute_capabilities or () for part in ("--compute-capability", each)
        ]
        arguments = [
            *(["--fp16"] if precision == "fp16" else []),
            *model,
            *(["--backend", str(DEPLOYMENTS[target].tensorrt)] if target else []),
            *gpus,
            *(["--buckets", buckets] if buckets else []),
            *chosen,
        ]
        steps.append(Step("build-engine", arguments, lambda: None))
    # With --json the results of the steps go where their progress goes.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        done = _run(context, steps, dry_run=dry_run)
    if elsewhere is not None:
        messages.print(elsewhere, markup=False)
    if as_json:
        print_json({"kind": "build", "model": directory, "dry_run": dry_run, "steps": done})


def _run(context: typer.Context, steps: list[Step], *, dry_run: bool) -> list[dict[str, Any]]:
    """Run what is not done yet.

    Raises:
        MmvisionError: A step's; its hint says where the next call goes on.
        typer.Exit: A step ended with a code of its own.
    """
    done: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        title = f"{number}/{len(steps)} {step.name}"
        kept = step.kept() if not (dry_run and any(not each["kept"] for each in done)) else None
        done.append({"step": step.name, "command": step.line, "kept": kept})
        messages.print(f"{title}: {f'kept, {kept}' if kept else step.line}", markup=False)
        if kept or dry_run:
            continue
        where = f"run the same mmvision build again: it goes on at step {title}"
        try:
            step.prepare()
            code = call(context, step.name, *step.arguments)
        except OutputError as error:
            if step.name != "build-engine" or error.reason != "exists":
                raise
            done[-1]["kept"] = error.message
            messages.print(f"{title}: kept, {error.message}", markup=False)
        except MmvisionError as error:
            error.hint = f"{error.hint}; then {where}" if error.hint else where
            raise
        else:
            if code:
                messages.print(f"hint: {where}", markup=False)
                raise typer.Exit(code)
    return done


def _exported(directory: Path, weights: list[str]) -> str | None:
    """Why the export is kept.

    Raises:
        OutputError: The directory has another model.
        ManifestError: A file of it is missing, or of another size.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest = Manifest.read(directory)
    source = manifest.source
    if source.get("kind") == "random":
        there = ["--preset", str(source.get("preset"))]
        there += [
            f"--random-weights={source.get('random_kind', 'plain')}",
            "--seed",
            str(source["seed"]),
        ]
    else:
        there = ["--checkpoint", str(source["checkpoint"])]
    if _resolved(there) != _resolved(weights):
        raise OutputError(
            f"{directory} holds another model: {' '.join(there)}",
            hint="choose another --output, or replace it with mmvision export --force",
        )
    for name, record in manifest.files.items():
        record.verify_size(directory / name, said_by="the manifest")
    return f"{directory} was exported on {manifest.created[:10]}"


def _resolved(weights: list[str]) -> list[str]:
    """With the checkpoint's folder as an absolute path, which a manifest may or may not have."""
    return [str(Path(each).resolve()) if Path(each).is_dir() else each for each in weights]


def _derive(directory: Path) -> None:
    """Make the float16 graph that a float16 engine is built from."""
    from mmvision_export.engine.float16 import derive_fp16

    manifest = Manifest.read(directory)
    if manifest.precision == "fp32":
        with progress_display() as progress:
            derive_fp16(directory, manifest, progress=progress)


def _compared(directory: Path, derives: bool) -> str | None:
    """Why the comparison is kept: each graph has passed one, the float16 graph too if it is needed."""
    if not (directory / MANIFEST).exists():
        return None
    manifest = Manifest.read(directory)
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    if derives and manifest.precision == "fp32" and flavour_graph("fp16") not in graphs:
        return None
    if all(is_compared(name, manifest.files, manifest.parity) for name in graphs):
        return f"{len(graphs)} graphs have passed"
    return None


def _elsewhere(target: DeploymentName | None, directory: Path) -> str | None:
    """What is left to do on another machine: TensorRT builds on the GPU that it builds for."""
    if target is None or not DEPLOYMENTS[target].capabilities:
        return None
    from mmvision_export.runtime.backends.cuda import current_compute_capability

    try:
        found = current_compute_capability(0)
    except MmvisionError:
        found = None
    here = "no GPU" if found is None else f"a GPU of compute capability {found}"
    if found is not None and DEPLOYMENTS[target].has_gpu(found):
        return None
    return (
        f"TensorRT builds an engine on the GPU that the engine is for, and this machine has {here}: copy "
        f"{directory} to the Jetson, and run there: mmvision build-engine --fp16 --model {directory}"
    )
