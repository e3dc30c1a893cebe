"""The `mmvision lower` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, progress_display
from mmvision_export.cli.engine_sizes import EngineSizes
from mmvision_export.cli.options import (
    AsJson,
    ModelOption,
    Quiet,
    Verbose,
    one_precision,
    print_json,
    the_model,
)
from mmvision_export.core.errors import ManifestError

__all__ = ["lower"]

Way = Literal["plugin", "packed", "uniform", "equal", "native"]


@examples(
    "mmvision lower --attention uniform --fp16 --output deploy/encoder.onnx",
    "mmvision lower --attention plugin --tensorrt 10.3 --fp16 --buckets 1024,4096 --output x/encoder.onnx",
)
def lower(
    attention: Annotated[
        Way,
        typer.Option(
            help="plugin: our operators stay in the graph, for our library. packed: TensorRT 11.1's own. uniform and "
            "equal: images in slots. native: one masked product."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="ONNX", help="The graph to write, outside the model directory.")
    ],
    model: ModelOption = None,
    tensorrt: Annotated[
        str,
        typer.Option(
            metavar="VERSION|rtx",
            help="The TensorRT whose parser reads the graph, as 10.3 (JetPack 6.2) or 11.1; or rtx.",
        ),
    ] = "10.3",
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="The INT8 graph of quantize.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The FP8 graph of quantize.")] = False,
    buckets: Annotated[
        Optional[str], typer.Option(metavar="N,N,...", help="Sizes: see mmvision build-engine.")
    ] = None,
    max_patches: Annotated[
        Optional[int], typer.Option(metavar="N", help="Most patches of a batch. Default: 4096.")
    ] = None,
    max_images: Annotated[
        Optional[str], typer.Option(metavar="N[,N...]", help="Most images of a batch. Default: 64.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare a converted float16 graph first.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the files.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the graph that build-engine parses.

    trtexec, DeepStream, Triton and other tools read the same graph. Beside the graph lie its weights
    and a .json file with the shapes of the profiles and the command that builds an engine. Lowering
    needs neither TensorRT nor a GPU.
    """
    from mmvision_export.artifacts.build_target import TensorRTVersion
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.artifacts.preprocessing import preprocessor_of
    from mmvision_export.engine.lower import lower as write

    try:
        version = TensorRTVersion("1.7" if tensorrt == "rtx" else tensorrt)
    except ManifestError as error:
        raise typer.BadParameter(f"--tensorrt: {error.message}") from None
    sizes = EngineSizes(buckets=buckets, max_patches=max_patches, max_images=max_images)
    directory = the_model(model)
    manifest = Manifest.read(directory)
    most = preprocessor_of(directory, manifest).most_patches
    with progress_display() as progress:
        written = write(
            directory,
            manifest,
            output,
            attention=attention,
            tensorrt=version,
            backend="tensorrt-rtx" if tensorrt == "rtx" else "tensorrt",
            profiles=sizes.profiles(attention, manifest.config, largest_image=most),
            precision=one_precision(fp16=fp16, int8=int8, fp8=fp8),
            check=check,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "kind": "lower",
                "graph": written.graph,
                "facts": written.facts,
                "command": written.command,
            }
        )
        return
    size = sum(
        file.stat().st_size
        for file in (output, output.with_name(f"{output.name}.data"))
        if file.exists()
    )
    console.print(f"{written.graph}: {attention} attention, {size / 1e6:.1f} MB", markup=False)
    console.print(written.command, markup=False)
