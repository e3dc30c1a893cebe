"""The build target: which TensorRT, GPUs and precision, settled before any work is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.build_options import DEFAULT_OPTIONS, BuildOptions
from mmvision_export.artifacts.build_target import (
    TENSORRT_NAMES,
    BuildTarget,
    TensorRTName,
    TensorRTVersion,
)
from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.artifacts.manifest import Manifest, flavour_graph
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, EngineError
from mmvision_export.core.install import install_command
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.choices import TensorRTChoice
from mmvision_export.runtime.backends.cuda import Cuda, current_gpu
from mmvision_export.runtime.backends.tensorrt import (
    current_platform,
    import_tensorrt,
)

__all__ = ["choose_tensorrt", "resolve_target", "supported_by_rtx", "timing_on"]


def choose_tensorrt(choice: TensorRTChoice) -> TensorRTName:
    """The TensorRT to build with: the one named, or for `auto` the first that is installed.

    Raises:
        BackendError: It is not installed, or neither is.
    """
    if choice != "auto":
        import_tensorrt(choice)
        return choice
    for candidate in TENSORRT_NAMES:
        try:
            import_tensorrt(candidate)
        except BackendError:
            continue
        return candidate
    raise BackendError(
        "neither tensorrt nor tensorrt_rtx is installed",
        hint=f"{install_command('rtx')}, or [tensorrt] for a data-centre GPU; JetPack brings its own",
    )


def supported_by_rtx(trt: Any) -> list[ComputeCapability]:
    """What a TensorRT-RTX module can build for, ascending."""
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(map(ComputeCapability.parse, names))


def resolve_target(
    directory: Path,
    manifest: Manifest,
    *,
    precision: str | None,
    backend: TensorRTChoice,
    compute_capabilities: Sequence[ComputeCapability],
    device: int | None,
    options: BuildOptions | None = None,
    progress: Progress,
) -> BuildTarget:
    """What an engine of a model directory is built with and for.

    Args:
        directory: The model directory.
        manifest: Its manifest.
        precision: Of the engine, that of `model.onnx` if None.
        backend: TensorRT to build with.
        compute_capabilities: See `build_engine`.
        device: See `build_engine`.
        options: See `build_engine`.
        progress: Told if no GPU was named and none is here.

    Raises:
        BackendError: TensorRT is not installed, or there is no such device.
        EngineError: It cannot build that, or no graph of that precision can be had.
    """
    backend = choose_tensorrt(backend)
    trt = import_tensorrt(backend)
    version = TensorRTVersion(str(trt.__version__))
    precision = precision or manifest.precision
    _refuse_precision(directory, manifest, precision)
    gpu: Gpu | None = None
    if backend == "tensorrt":
        gpu = _gpu_of_this_machine(compute_capabilities, device)
        capabilities = [gpu.compute_capability]
    else:
        supported = list(filter(PRECISIONS[precision].runs_on, supported_by_rtx(trt)))
        for capability in compute_capabilities:
            if capability not in supported:
                raise EngineError(
                    f"TensorRT-RTX {version} does not build {precision} engines for {capability}, "
                    f"only for {', '.join(map(str, supported))}"
                )
        capabilities = _gpus_for_rtx(compute_capabilities, supported, device, progress)
    return BuildTarget(
        backend=backend,
        tensorrt_version=version,
        platform=current_platform(),
        compute_capabilities=tuple(capabilities),
        precision=precision,
        opset=manifest.opset,
        gpu=gpu,
        options=options or DEFAULT_OPTIONS,
    )


@contextlib.contextmanager
def timing_on(target: BuildTarget, device: int | None) -> Iterator[None]:
    """Let a build use a GPU meanwhile: TensorRT takes the calling thread's device.

    Args:
        target: What is built for. TensorRT times kernels on its GPU; TensorRT-RTX times nothing, and
            needs a GPU for engines that take weights only.
        device: The GPU's index.

    Raises:
        BackendError: The device does not work.
    """
    if target.gpu is None and not target.options.takes_weights:
        yield
        return
    cuda = Cuda(device or 0)
    cuda.use()
    try:
        yield
    finally:
        cuda.close()


def _refuse_precision(directory: Path, manifest: Manifest, precision: str) -> None:
    if precision == manifest.precision:
        return
    row = PRECISIONS.get(precision)
    if row is not None and row.is_quantized:
        if flavour_graph(precision) not in manifest.files:
            raise EngineError(
                f"{directory} has no {flavour_graph(precision)}, "
                f"which an {precision} engine is built from",
                hint=f"make it with: mmvision quantize --{precision} --model {directory}",
            )
    elif row is None or manifest.precision not in row.derived_from:
        raise EngineError(
            f"{directory} is a {manifest.precision} model, "
            f"from which no {precision} engine can be built",
            hint=f"export it again with --{precision}",
        )


def _gpu_of_this_machine(wanted: Sequence[ComputeCapability], device: int | None) -> Gpu:
    here = current_gpu(device or 0)
    if here is None:
        raise EngineError(
            "TensorRT builds for the GPU it runs on, and there is none here",
            hint="build with --backend tensorrt-rtx --compute-capability ..., "
            "or on the target machine",
        )
    if not set(wanted) <= {here.compute_capability}:
        raise EngineError(
            f"TensorRT builds for the GPU it runs on, {here.compute_capability}; "
            f"it cannot build for {', '.join(map(str, wanted))}",
            hint="build with --backend tensorrt-rtx, or on the target machine",
        )
    return here


def _gpus_for_rtx(
    wanted: Sequence[ComputeCapability],
    supported: list[ComputeCapability],
    device: int | None,
    progress: Progress,
) -> list[ComputeCapability]:
    if wanted:
        if device is not None:
            raise EngineError(
                f"TensorRT-RTX builds on no GPU: compute capability "
                f"{', '.join(map(str, wanted))} and device {device} were both given",
                hint="name what to build for by one of --compute-capability and --device",
            )
        return sorted(set(wanted))
    here = current_gpu(device or 0)
    if here is not None:
        return [here.compute_capability]
    if device is not None:
        raise EngineError(
            f"there is no CUDA device {device}: this machine has no GPU",
            hint="name the GPU to build for with --compute-capability",
        )
    progress.note(
        "no GPU here: building for all that TensorRT-RTX supports, "
        f"{', '.join(map(str, supported))}"
    )
    return supported
