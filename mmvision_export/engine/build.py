"""Engines from a model directory's graph, with TensorRT or TensorRT-RTX, on every version strongly typed.

The types are those of the ONNX graph; there is no builder flag that changes one. How attention is written down is
chosen here, in memory, for the TensorRT that will parse it. With TensorRT-RTX neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mmvision_export.artifacts.engine_record import EngineRecord, PluginFile, sidecar_path
from mmvision_export.artifacts.manifest import (
    DATA,
    GRAPH,
    PLANS,
    Manifest,
    flavour_graph,
)
from mmvision_export.artifacts.plugin_library import default_library
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, EngineError, OutputError
from mmvision_export.core.files import file_record, new_files
from mmvision_export.core.precision import PRECISIONS, QUANTIZED_PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import choose_lowering, lowered_model
from mmvision_export.engine.builder import PlanRequest, plan_from_model
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.runtime.backends.cuda import current_compute_capability
from mmvision_export.runtime.backends.plugin_library import load_plugin_library
from mmvision_export.runtime.backends.tensorrt import (
    TENSORRT_MODULES,
    current_platform,
    import_tensorrt,
)
from mmvision_export.version import __version__

__all__ = ["build_engine", "checked_profile", "choose_tensorrt"]

_NO_FUSED_KERNEL = "not supported by a dedicated kernel"


def choose_tensorrt(backend: str) -> str:
    """The TensorRT to build with: the one named, or for `auto` the one that is installed, TensorRT first.

    Raises:
        BackendError: It is not installed, or neither is.
    """
    if backend != "auto":
        import_tensorrt(backend)
        return backend
    for candidate in TENSORRT_MODULES:
        try:
            import_tensorrt(candidate)
        except BackendError:
            continue
        return candidate
    raise BackendError(
        "neither tensorrt nor tensorrt_rtx is installed",
        hint="pip install '.[rtx]', or [tensorrt] for a data-centre GPU; JetPack brings its own",
    )


def checked_profile(profile: Profile, config: EncoderConfig) -> Profile:
    """Validate an optimization profile.

    Raises:
        EngineError: A size is not a multiple of the merge block, or they are not in order.
    """
    per_token = config.patches_per_token
    for name in ("min_patches", "max_patches", "opt_patches"):
        value = getattr(profile, name)
        if value < per_token or value % per_token:
            raise EngineError(
                f"--{name.replace('_', '-')} must be a positive multiple of {per_token}, got {value}"
            )
    if not profile.min_patches <= profile.opt_patches <= profile.max_patches:
        raise EngineError(
            "--min-patches, --opt-patches and --max-patches must ascend, got "
            f"{profile.min_patches}, {profile.opt_patches}, {profile.max_patches}"
        )
    most = profile.max_patches // per_token
    if not 1 <= profile.max_images <= most:
        raise EngineError(
            f"--max-images must be between 1 and {most} (every image has at least {per_token} patches), got "
            f"{profile.max_images}"
        )
    return profile


def supported_by_rtx(trt: Any) -> list[ComputeCapability]:
    """What a TensorRT-RTX module can build for, ascending."""
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(map(ComputeCapability.parse, names))


def build_engine(
    directory: Path,
    *,
    profiles: Sequence[Profile],
    precision: str | None = None,
    backend: str = "auto",
    compute_capabilities: Sequence[ComputeCapability] = (),
    attention: str = "auto",
    plugin_library: Path | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, EngineRecord]:
    """Build an engine into a model directory's `plans/`.

    Args:
        directory: The model directory.
        profiles: Accepted sizes, one optimization profile for each entry.
        precision: Of the engine, the graph's own if None. fp16 from an fp32 graph derives the float16-typed graph
            first; int8 and fp8 come from the graphs that `mmvision quantize` makes.
        backend: `auto`, `tensorrt` or `tensorrt-rtx`.
        compute_capabilities: GPUs to build for with TensorRT-RTX. This machine's if empty; on a
            machine without a GPU, all that this TensorRT-RTX can build for.
        attention: How attention is done, of `lowering.ATTENTION_WAYS`.
        plugin_library: Where the plugin library is; where `build-plugins` puts it if None. The engine's folder gets a
            copy.
        check: Compare a newly derived float16 graph with the float32 one in ONNX Runtime before building from it, and
            refuse a graph that failed its comparison with PyTorch.
        force: Replace an engine of the same name.
        progress: Told about each step.

    Returns:
        The engine's path and its sidecar's content.

    Raises:
        ManifestError: The model directory is not one, or damaged.
        BackendError: TensorRT is not installed.
        EngineError: The request cannot be met, the graph was not parsed, or the engine was not built.
        OutputError: The engine exists, or cannot be written.
    """
    progress = progress or Progress()
    manifest = Manifest.read(directory)
    profiles = [checked_profile(profile, manifest.config) for profile in profiles]
    backend = choose_tensorrt(backend)
    trt = import_tensorrt(backend)
    version = str(trt.__version__)
    precision = precision or manifest.precision
    if precision in QUANTIZED_PRECISIONS:
        if flavour_graph(precision) not in manifest.files:
            raise EngineError(
                f"{directory} has no {flavour_graph(precision)}, which an {precision} engine is built from",
                hint=f"make it with: mmvision quantize --{precision} --model {directory}",
            )
    elif precision != manifest.precision and (
        precision not in PRECISIONS or manifest.precision not in PRECISIONS[precision].derived_from
    ):
        raise EngineError(
            f"{directory} is a {manifest.precision} model, from which no {precision} engine can be built",
            hint=f"export it again with --{precision}",
        )
    capabilities = _capabilities(trt, backend, compute_capabilities, precision, progress)
    targets = "-".join(str(capability.sm) for capability in capabilities)
    engine = directory / PLANS / f"{backend}-{version}-sm{targets}-{precision}.engine"
    if engine.exists() and not force:
        raise OutputError(f"{engine} already exists", hint="replace it with --force")

    graph = _graph_for(directory, manifest, precision, check=check, progress=progress)
    if graph not in manifest.parity:
        progress.note(
            f"{graph} has not been compared with PyTorch yet: mmvision parity --model {directory}"
        )
    for name in dict.fromkeys((GRAPH, graph)):
        if check and not manifest.parity.get(name, {"passed": True}).get("passed"):
            raise EngineError(
                f"{name} did not pass its comparison with PyTorch",
                hint=f"see: mmvision parity --model {directory}; build it all the same with --no-check",
            )
    lowering = choose_lowering(
        attention,
        backend=backend,
        version=version,
        opset=manifest.opset,
        precision=precision,
        config=manifest.config,
        compute_capabilities=capabilities,
        library=plugin_library or default_library(),
        progress=progress,
    )
    if lowering.library is not None:
        load_plugin_library(trt, lowering.library[0], lowering.library[1].library.sha256)
    progress.step("lowering the graph")
    model = lowered_model(directory / graph, lowering)
    with new_files(directory / PLANS, name=engine.name) as new:
        plan, fused = _plan(
            PlanRequest(
                model=ir.serde.serialize_model(model).SerializeToString(),
                location=directory / graph,
                backend=backend,
                compute_capabilities=capabilities,
                profiles=profiles,
                patch_dim=manifest.config.patch_dim,
                timing_cache=_timing_cache(directory, backend, version),
            ),
            # No TensorRT has a fused attention kernel in float32.
            may_fuse=lowering.body == "attention" and PRECISIONS[precision].has_half_attention,
            progress=progress,
        )
        progress.step("writing the engine")
        (new / engine.name).write_bytes(plan)
        plugins = None
        if lowering.library is not None:
            # Beside the engine, so that its folder is all there is to copy.
            plugins = PluginFile.of(lowering.library[1].library)
            shutil.copyfile(lowering.library[0], new / plugins.name)
        record = EngineRecord(
            backend=backend,
            tensorrt_version=version,
            compute_capabilities=[str(capability) for capability in capabilities],
            platform=current_platform(),
            precision=precision,
            attention=lowering.describe(fused=fused),
            profiles=profiles,
            graph={
                "name": graph,
                "sha256": manifest.files[graph].sha256,
                "data_sha256": manifest.files[f"{graph}.data"].sha256,
            },
            engine=file_record(new / engine.name),
            plugin_library=plugins,
            config=manifest.config,
            versions={
                "mmvision-export": __version__,
                "polygraphy": importlib.metadata.version("polygraphy"),
                "onnx": importlib.metadata.version("onnx"),
            },
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        record.write(new / sidecar_path(engine).name)
    # What was measured on an engine of this name was measured on another one.
    if f"{PLANS}/{engine.name}" in manifest.parity:
        manifest.update(directory, without_parity=f"{PLANS}/{engine.name}")
    return engine, record


def _timing_cache(directory: Path, backend: str, version: str) -> Path | None:
    if backend == "tensorrt-rtx":
        return None
    folder = directory / PLANS / ".timing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{backend}-{version}"


def _plan(request: PlanRequest, *, may_fuse: bool, progress: Progress) -> tuple[bytes, bool]:
    """The plan, and whether every attention layer is known to be one fused kernel."""
    if may_fuse:
        # Without permission to decompose, the builder fails rather than fall back to unfused kernels in silence.
        try:
            return plan_from_model(request, decomposable=False, progress=progress), True
        except EngineError as error:
            if _NO_FUSED_KERNEL not in str(error):
                raise
        progress.note(
            "there is no fused attention kernel for this: building it from separate products"
        )
    return plan_from_model(request, decomposable=True, progress=progress), False


def _graph_for(
    directory: Path, manifest: Manifest, precision: str, *, check: bool, progress: Progress
) -> str:
    progress.step("verifying the graph's files")
    if precision in QUANTIZED_PRECISIONS:
        graph = flavour_graph(precision)
        manifest.verify(directory, (graph, f"{graph}.data"))
        return graph
    if precision != manifest.precision:
        return derive_fp16(directory, manifest, check=check, progress=progress)
    manifest.verify(directory, (GRAPH, DATA))
    return GRAPH


def _capabilities(
    trt: Any,
    backend: str,
    requested: Sequence[ComputeCapability],
    precision: str,
    progress: Progress,
) -> list[ComputeCapability]:
    here = current_compute_capability()
    wanted = sorted(set(requested))
    if backend == "tensorrt":
        if here is None:
            raise EngineError(
                "TensorRT builds for the GPU it runs on, and there is none here",
                hint="build with --backend tensorrt-rtx --compute-capability ..., or on the target machine",
            )
        if wanted not in ([], [here]):
            raise EngineError(
                f"TensorRT builds for the GPU it runs on, {here}; it cannot build for {', '.join(map(str, wanted))}",
                hint="build with --backend tensorrt-rtx, or on the target machine",
            )
        return [here]
    supported = supported_by_rtx(trt)
    supported = list(filter(PRECISIONS[precision].runs_on, supported))
    for capability in wanted:
        if capability not in supported:
            raise EngineError(
                f"TensorRT-RTX {trt.__version__} does not build {precision} engines for {capability}, only for "
                f"{', '.join(map(str, supported))}"
            )
    if wanted:
        return wanted
    if here is not None:
        return [here]
    progress.note(
        f"no GPU here: building for all that TensorRT-RTX supports, {', '.join(map(str, supported))}"
    )
    return supported
