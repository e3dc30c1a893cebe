"""The `mmvision export` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.options import Quiet, Verbose, one_precision, refuse_undecodable
from mmvision_export.core.errors import ConfigError
from mmvision_export.models.minimax_m3_vl.config import Preset
from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
from mmvision_export.models.random_kind import RandomKind

__all__ = ["export"]

HUB_CHECKPOINT = "MiniMaxAI/MiniMax-M3"


@examples(
    "mmvision export --onnx --checkpoint ./MiniMax-M3",
    "mmvision export --onnx --fp16 --checkpoint MiniMaxAI/MiniMax-M3 --resize long-side",
    "mmvision export --onnx --preset tiny --random-weights --output engines/tiny",
)
def export(
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write ONNX, the only format so far.", show_default=False)
    ] = True,
    checkpoint: Annotated[
        Optional[str],
        typer.Option(
            metavar="DIR|HUB_ID", help=f"Checkpoint folder or hub id. Default: {HUB_CHECKPOINT}."
        ),
    ] = None,
    revision: Annotated[
        Optional[str],
        typer.Option(metavar="REVISION", help="Branch, tag or commit of the hub repository."),
    ] = None,
    preset: Annotated[
        Optional[Preset],
        typer.Option(
            help="Dimensions for --random-weights: tiny (7 M parameters), shallow (the released "
            "widths and 4 layers, 315 M) or full (865 M)."
        ),
    ] = None,
    random_weights: Annotated[
        Optional[RandomKind],
        typer.Option(
            metavar="[plain|outliers]",
            help="Seeded random weights instead of a checkpoint: plain (also with no value), or with the outlier "
            "channels and massive activations of trained vision transformers.",
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
            help="Model directory to make. Default: engines/ and the name of the checkpoint or preset.",
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32 graph (default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 graph.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="bfloat16 graph, with float32 input and output.")
    ] = False,
    opset: Annotated[
        int,
        typer.Option(
            metavar="N", help="ONNX opset, 18 to 23. Below 23, attention is MatMul and Softmax."
        ),
    ] = 23,
    resize: Annotated[
        Optional[ResizeRule],
        typer.Option(
            help="How large an image becomes: area as in transformers, long-side as in SGLang and "
            "MiniMax's format check, box as in M3.1. Default: the checkpoint's, or area."
        ),
    ] = None,
    max_long_side: Annotated[
        Optional[int],
        typer.Option(
            metavar="PIXELS",
            help="With --resize long-side: 112 to 3584, a multiple of 28. Default: 2016.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the graph with PyTorch on one small grid, which takes seconds.",
        ),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model directory if it exists.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export the encoder to ONNX, into a new model directory.

    The default is a float32 directory. build-engine --fp16 and quantize start from one.
    """
    precision = one_precision(fp32=fp32, fp16=fp16, bf16=bf16) or "fp32"
    if random_weights and (checkpoint or revision):
        raise typer.BadParameter("--random-weights takes no --checkpoint or --revision")
    if random_weights and preset is None:
        raise typer.BadParameter("--random-weights needs --preset tiny, shallow or full")
    if (preset or seed is not None) and not random_weights:
        raise typer.BadParameter("--preset and --seed go with --random-weights")
    if checkpoint == "":
        raise typer.BadParameter("--checkpoint is empty")
    if max_long_side is not None:
        if resize != "long-side":
            raise typer.BadParameter("--max-long-side goes with --resize long-side")
        # Before the weights are loaded, by the rule that the preprocessing has.
        from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig

        try:
            PreprocessorConfig().by(resize, max_long_side=max_long_side)
        except ConfigError as error:
            raise typer.BadParameter(
                f"{error.message}; {error.hint}" if error.hint else error.message
            ) from error

    from mmvision_export.export.onnx_export import export_model_directory
    from mmvision_export.models.weights import WeightSource
    from mmvision_export.parity.quick import QuickCheck

    if preset is not None and random_weights is not None:
        source = WeightSource.random(preset, seed or 0, random_weights)
        output = output or Path("engines") / preset
    else:
        source = WeightSource(checkpoint=checkpoint or HUB_CHECKPOINT, revision=revision)
        output = output or Path("engines") / Path(checkpoint or HUB_CHECKPOINT).resolve().name
    refuse_undecodable(output)
    with progress_display() as progress:
        manifest = export_model_directory(
            source,
            output,
            precision=precision,
            opset=opset,
            resize=resize,
            max_long_side=max_long_side,
            force=force,
            check=QuickCheck if check else None,
            progress=progress,
        )
    size = sum(record.size_bytes for record in manifest.files.values())
    console.print(
        f"{output}: {precision} graph, opset {manifest.opset}, {size / 1e6:.1f} MB", markup=False
    )
    messages.print(f"next: mmvision parity --model {output}", markup=False)
