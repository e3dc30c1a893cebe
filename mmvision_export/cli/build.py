"""The `mmvision build-plugins` and `mmvision build-engine` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.artifacts.build_options import DEFAULT_OPTIONS, BuildOptions
from mmvision_export.artifacts.library_record import Machine
from mmvision_export.cli.build_options import (
    Hardware,
    OptimizationLevel,
    Refit,
    StripWeights,
    TimingCacheFile,
    VersionCompatible,
    WeightStreaming,
    Workspace,
)
from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.engine_sizes import EngineSizes
from mmvision_export.cli.options import (
    AsJson,
    ModelOption,
    Quiet,
    Verbose,
    compute_capability,
    one_precision,
    print_json,
    the_model,
)
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.records import json_from_record
from mmvision_export.engine.choices import AttentionWay, TensorRTChoice

__all__ = ["build_engine", "build_plugins"]


@examples(
    "mmvision build-plugins --sm 8.7 --machine aarch64",
    "mmvision build-plugins --sm 8.0 9.0 --head-dim 80",
    "mmvision build-plugins --cpu",
)
def build_plugins(
    sm: Annotated[
        Optional[list[ComputeCapability]],
        typer.Option(
            metavar="CC",
            parser=compute_capability,
            help="GPUs to compile for, as 8.7 or 87 for Orin. Default: all from "
            "8.0 (Ampere) to 12.0.",
        ),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],
        typer.Option(
            metavar="D",
            help="Head sizes of the attention kernel. Default: all, 16 to 128.",
        ),
    ] = None,
    machine: Annotated[
        Optional[Machine],
        typer.Option(
            help="CPU the library will run on. Default: this one's; another is cross-compiled."
        ),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR", help="Folder for the library. Default: engines/plugins/ and the CPU."
        ),
    ] = None,
    tensorrt_include: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            envvar="TENSORRT_INCLUDE_DIR",
            help="Folder with NvInferRuntime.h, of TensorRT 10.0 or later. Default: where "
            "TensorRT or JetPack puts it.",
        ),
    ] = None,
    onnxruntime_include: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            envvar="ONNXRUNTIME_INCLUDE_DIR",
            help="With --cpu: folder with onnxruntime_c_api.h, to compare the library's own table with.",
        ),
    ] = None,
    cpu: Annotated[
        bool,
        typer.Option(
            "--cpu",
            help="Build libmmvision_amx.so instead, for ONNX Runtime on x86-64 CPUs with AMX.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the library if it exists.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compile the plugin library for TensorRT or AMX.

    With libmmvision_plugins.so, TensorRT computes attention image by image. The library serves the
    major version of TensorRT whose headers compiled it, 10 or 11, and every GPU that it has kernels
    for. The build needs CMake, g++, TensorRT's headers and Triton, but no GPU and no CUDA toolkit.
    All kernels take two minutes on two cores.

    With --cpu, the command builds libmmvision_amx.so instead, for --backend onnxruntime-amx. ONNX
    Runtime then multiplies float32 matrices on AMX, which Intel Xeons have from Sapphire Rapids on.
    That build needs CMake and g++, and takes seconds.
    """
    if cpu:
        if sm or head_dim or machine is not None or tensorrt_include is not None:
            raise typer.BadParameter("--cpu takes only --output, --onnxruntime-include and --force")
        _build_amx_library(output, onnxruntime_include, force)
        return
    from mmvision_export.kernels.tensorrt_library import build_plugins as build

    with progress_display() as progress:
        library, record = build(
            compute_capabilities=sm or (),
            head_dims=head_dim or (),
            machine=machine,
            output=output,
            tensorrt_include=tensorrt_include,
            force=force,
            progress=progress,
        )
    console.print(
        f"{library}: {record.machine}, {record.library.size_bytes / 1e6:.1f} MB, "
        f"compute capability {', '.join(map(str, record.compute_capabilities))}, "
        f"head_dim {', '.join(map(str, record.head_dims))}; "
        f"what each kernel uses: {library.parent / 'kernels.md'}",
        markup=False,
    )


def _build_amx_library(output: Path | None, onnxruntime_include: Path | None, force: bool) -> None:
    from mmvision_export.kernels.amx_library import build_amx_library
    from mmvision_export.runtime.backends.onnxruntime_amx import cpu_has_amx

    with progress_display() as progress:
        library, record = build_amx_library(
            output=output,
            onnxruntime_include=onnxruntime_include,
            force=force,
            progress=progress,
        )
    size = f"{record.library.size_bytes / 1e6:.1f} MB"
    console.print(f"{library}: {size}, {record.versions['compiler']}", markup=False)
    use = f"use it with: mmvision run --backend onnxruntime-amx --kernel-library {library}"
    here = "" if cpu_has_amx() else ", on another machine: this CPU has no AMX"
    console.print(f"{use}{here}", markup=False)


@examples(
    "mmvision build-engine --fp16 --compute-capability 8.9",
    "mmvision build-engine --fp16 --attention uniform --buckets 1x1024,8x1024,1x13824",
    "mmvision build-engine --int8 --model engines/MiniMax-M3",
    "mmvision build-engine --fp16 --strip-weights --refit --optimization-level 5 --workspace 4G",
)
def build_engine(
    model: ModelOption = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="float16 engine; a float32 graph is converted first.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="INT8 engine, from the graph that mmvision quantize made."),
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="FP8 engine, from the graph that mmvision quantize made.")
    ] = False,
    backend: Annotated[
        TensorRTChoice,
        typer.Option(help="TensorRT to build with; auto takes the one that is installed."),
    ] = "auto",
    compute_capabilities: Annotated[
        Optional[list[ComputeCapability]],
        typer.Option(
            "--compute-capability",
            metavar="CC",
            parser=compute_capability,
            help="GPUs to build for with TensorRT-RTX, as 8.9 or 89. Default: "
            "this machine's GPU, or without one all that TensorRT-RTX supports.",
        ),
    ] = None,
    device: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=0,
            help="CUDA device to build on with TensorRT, or to build for with TensorRT-RTX. "
            "Default: 0.",
        ),
    ] = None,
    attention: Annotated[
        AttentionWay,
        typer.Option(
            help="plugin: our kernels, for TensorRT. packed: TensorRT 11.1's own. uniform: images in "
            "slots of equal length, which cost slots times the square of their length. equal: images "
            "that fill their slots. native: one masked product, which costs the square of the whole "
            "batch. auto: plugin where it can be, else packed, else uniform unless the sizes are of "
            "another form, else native."
        ),
    ] = "auto",
    plugin_library: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE", help="libmmvision_plugins.so. Default: where build-plugins puts it."
        ),
    ] = None,
    buckets: Annotated[
        Optional[str],
        typer.Option(
            metavar="N,N,...",
            help="Sizes in patches, as 256,1024,2304,4096. A batch is padded to the smallest size that has "
            "room. For uniform and equal attention: slots and their length in patches, as "
            "1x1024,8x1024,16x256. Excludes --min-, --opt- and --max-patches.",
        ),
    ] = None,
    min_patches: Annotated[
        Optional[int], typer.Option(metavar="N", help="Fewest patches of a batch. Default: 4.")
    ] = None,
    opt_patches: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Patches the kernels are chosen for. Default: 1024, or the maximum if less.",
        ),
    ] = None,
    max_patches: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Most patches of a batch, all images together. Default: 4096, or what the model "
            "directory's preprocessing makes of the largest image.",
        ),
    ] = None,
    max_images: Annotated[
        Optional[str],
        typer.Option(
            metavar="N[,N...]",
            help="Most images of a launch. With --buckets of patches several numbers, each with a "
            "profile of its own. Default: 64, or 8,64 with --buckets. Slots say so themselves.",
        ),
    ] = None,
    workspace: Workspace = None,
    optimization_level: OptimizationLevel = None,
    timing_cache: TimingCacheFile = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: Hardware = None,
    strip_weights: StripWeights = False,
    refit: Refit = False,
    weight_streaming: WeightStreaming = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare a converted float16 graph first, and refuse a graph that failed parity.",
        ),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine of the same name.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build a TensorRT or TensorRT-RTX engine.

    The engine goes into the model directory's plans/. A record beside it says what the engine is
    valid for. The engine has the graph's precision unless you give --fp16, --int8 or --fp8. With the
    released preprocessing a still image has at most 2304 patches; 4 patches make one image token.
    """
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.artifacts.preprocessing import preprocessor_of
    from mmvision_export.engine.build import build_engine as build

    sizes = EngineSizes(
        buckets=buckets,
        min_patches=min_patches,
        opt_patches=opt_patches,
        max_patches=max_patches,
        max_images=max_images,
    )
    options = BuildOptions(
        workspace_bytes=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware=hardware_compatible,
        strip_weights=strip_weights,
        refit=refit,
        weight_streaming=weight_streaming,
    )
    precision = one_precision(fp16=fp16, int8=int8, fp8=fp8)
    directory = the_model(model)
    manifest = Manifest.read(directory)
    preprocessor = preprocessor_of(directory, manifest)
    most = preprocessor.most_patches
    profiles = sizes.profiles(attention, manifest.config, largest_image=most)
    slots = sizes.slots(attention, manifest.config, largest_image=most)
    with progress_display() as progress:
        engine, record = build(
            directory,
            manifest,
            profiles=profiles,
            slots=slots,
            precision=precision,
            backend=backend,
            compute_capabilities=compute_capabilities or (),
            device=device,
            attention=attention,
            plugin_library=plugin_library,
            options=options,
            timing_cache=timing_cache,
            check=check,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({"kind": "engine", "path": engine, **json_from_record(record)})
        return
    console.print(
        f"{engine}: {record.precision}, {record.engine.size_bytes / 1e6:.1f} MB, "
        f"compute capability {', '.join(map(str, record.compute_capabilities))}, "
        f"attention: {record.attention}",
        markup=False,
    )
    if record.options != DEFAULT_OPTIONS:
        console.print(f"  options: {record.options}", markup=False)
    if record.layers is not None:
        console.print(f"  {record.layers}", markup=False)
    for profile in record.profiles:
        console.print(f"  {profile}", markup=False)
    room = max(profile.image_patches for profile in record.profiles)
    fits = "fits one launch" if most <= room else f"does not fit: {room} patches do"
    console.print(
        f"  the largest image of the preprocessing ({preprocessor}) has {most} patches and {fits}",
        markup=False,
    )
    messages.print(f"next: mmvision run --model {directory} --image photo.jpg", markup=False)
