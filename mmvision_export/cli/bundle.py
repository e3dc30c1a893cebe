"""The `mmvision bundle` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.artifacts.deployment import DEPLOYMENTS, DeploymentName
from mmvision_export.artifacts.library_record import Machine
from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages, progress_display
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

__all__ = ["bundle"]


@examples(
    "mmvision bundle --target jetson-orin --output MiniMax-M3-orin.tar",
    "mmvision bundle --target cpu --wheels packages --output MiniMax-M3-cpu.tar",
)
def bundle(
    target: Annotated[DeploymentName, typer.Option(help="The machine that the bundle is for.")],
    output: Annotated[
        Path,
        typer.Option(metavar="TAR", help="The archive. It unpacks to a folder of its name."),
    ],
    model: ModelOption = None,
    machine: Annotated[
        Optional[Machine],
        typer.Option(
            help="CPU of an rtx or dgpu target. Default: x86_64. Jetson and cpu targets need none."
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="float16 engine (default).")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Engine of the graph's precision.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 engine.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 engine.")] = False,
    buckets: Annotated[
        Optional[str],
        typer.Option(metavar="N,N,...", help="Sizes of an engine that the target builds."),
    ] = None,
    max_patches: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Most patches of a batch on the target.", min=1),
    ] = None,
    plugin_library: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="libmmvision_plugins.so for the target. Default: the library of build-plugins for "
            "the target's CPU, if it has kernels for the target's GPU.",
        ),
    ] = None,
    wheels: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Wheels of the required packages, for a target without a network. pip download fills the folder.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the archive.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pack a model, its runtime and its proof in a file.

    The archive holds the graph, its weights, the engines and kernels that are valid on the target, this
    package's wheel, patches with their embeddings, install.sh and verify.sh. On the target, verify.sh
    installs the packages, builds an engine if none fits, encodes the patches, and compares. The same
    input gives the same bytes.
    """
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.artifacts.plugin_library import default_library
    from mmvision_export.bundle.contents import library_part
    from mmvision_export.bundle.pack import write_bundle
    from mmvision_export.core.errors import ManifestError

    deployment = DEPLOYMENTS[target]
    precision = one_precision(fp16=fp16, fp32=fp32, int8=int8, fp8=fp8)
    if deployment.tensorrt is None and (
        precision or buckets or max_patches or plugin_library or machine
    ):
        raise typer.BadParameter("--target cpu has no engine: leave out the engine's options")
    EngineSizes(buckets=buckets, max_patches=max_patches)  # refuses what the target would
    directory = the_model(model)
    manifest = Manifest.read(directory)
    cpu = machine or deployment.machines[0]
    if plugin_library is None and deployment.tensorrt == "tensorrt":
        try:
            library_part(default_library(cpu), deployment, cpu)
            plugin_library = default_library(cpu)
        except ManifestError as error:
            messages.print(f"without a plugin library: {error.message}; {error.hint}", markup=False)
    with progress_display() as progress:
        written = write_bundle(
            directory,
            manifest,
            output,
            deployment,
            machine=machine,
            precision=precision or "fp16",
            build={"buckets": buckets, "max_patches": max_patches},
            plugin_library=plugin_library,
            wheels=wheels,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "kind": "bundle",
                "path": written.path,
                "size_bytes": written.size_bytes,
                "engines": written.engines,
                "plugin_library": written.has_library,
                "target": written.record.target,
                "machine": written.record.machine,
                "files": len(written.record.files) + 1,
            }
        )
        return
    engines = f"{len(written.engines)} engine{'s' * (len(written.engines) != 1)}"
    console.print(
        f"{written.path}: {len(written.record.files) + 1} files, {written.size_bytes / 1e6:.1f} MB, for "
        f"{deployment.title}" + (f", {engines}" if deployment.tensorrt is not None else ""),
        markup=False,
    )
    root = output.stem
    messages.print(
        f"next, on the target: tar xf {output.name} && cd {root} && ./verify.sh", markup=False
    )
