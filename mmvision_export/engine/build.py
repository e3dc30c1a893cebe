"""Engines from a model directory's graph, with TensorRT or TensorRT-RTX.

Networks are strongly typed on every version. The types are those of the ONNX graph; no builder flag
changes one. How attention is written down is chosen here, in memory, for the TensorRT that will
parse it. With TensorRT-RTX neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.manifest import DATA, GRAPH, PLANS, Manifest, flavour_graph
from mmvision_export.artifacts.plugin_library import default_library
from mmvision_export.artifacts.profile import Profile, checked_profile
from mmvision_export.artifacts.verdicts import failed_comparison
from mmvision_export.core.atomic import new_files, sweep
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attempts import (
    Attempt,
    attempts_from_lowering,
    first_that_builds,
)
from mmvision_export.engine.attention import choose_lowering, lowered_model
from mmvision_export.engine.builder import Plan, PlanRequest, plan_from_model
from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay, TensorRTChoice
from mmvision_export.engine.engine_files import (
    already_there,
    note_what_is_odd,
    record_of,
    remove_stale,
    trust,
    write_engine,
)
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.option_support import BuildRequest, refuse_options
from mmvision_export.engine.parser_support import parser_version
from mmvision_export.engine.target import resolve_target, timing_on
from mmvision_export.engine.timing_cache import TimingCache, timing_cache_for
from mmvision_export.runtime.backends.cuda import current_gpu
from mmvision_export.runtime.backends.plugin_library import load_plugin_library
from mmvision_export.runtime.backends.tensorrt import import_tensorrt

__all__ = ["build_engine"]


def build_engine(
    directory: Path,
    manifest: Manifest,
    *,
    profiles: Sequence[Profile],
    slots: Sequence[Profile] = (),
    precision: str | None = None,
    backend: TensorRTChoice = "auto",
    compute_capabilities: Sequence[ComputeCapability] = (),
    device: int | None = None,
    attention: AttentionWay = "auto",
    plugin_library: Path | None = None,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, EngineRecord]:
    """Build an engine into a model directory's `plans/`.

    Args:
        directory: The model directory.
        manifest: Its manifest; it then lists a newly derived graph, in memory and on disk.
        profiles: Accepted sizes, one optimization profile for each entry. They must be slots for
            the ways `uniform` and `equal`, may be for `auto`, and not for the others.
        slots: Sizes of slots, with two rows each, to take instead of `profiles` where `auto` can
            have neither the plugin nor packed attention.
        precision: Of the engine, the graph's own if None. fp16 from an fp32 graph derives the
            float16-typed graph first; int8 and fp8 come from the graphs that `mmvision quantize`
            makes.
        backend: TensorRT to build with.
        compute_capabilities: GPUs to build for with TensorRT-RTX. This machine's if empty; on a
            machine without a GPU, all that this TensorRT-RTX can build for.
        device: CUDA device to build on with TensorRT, or to build for with TensorRT-RTX; the first if
            None.
        attention: How attention is done.
        plugin_library: Where the plugin library is; where `build-plugins` puts it if None. The
            engine's folder gets a copy.
        options: What else is chosen of the engine; TensorRT's defaults if None.
        timing_cache: File of kernel timings to read and to add to, made if it is missing. By default
            one in the user's own cache, for each GPU and release. It holds compiled kernels, so that
            it must be a file that only this user can write to.
        check: Compare a newly derived float16 graph with the float32 one in ONNX Runtime before
            building from it, and refuse a graph that failed its comparison with PyTorch.
        force: Replace an engine of the same name.
        progress: Told about each step.

    Returns:
        The engine's path and its sidecar's content.

    Raises:
        ManifestError: Files of the model directory are missing or damaged.
        BackendError: TensorRT is not installed, or there is no such device.
        EngineError: The request cannot be met, an option is not to be had there, the graph was not
            parsed, or the engine was not built.
        InputError: The timing cache cannot be read.
        OutputError: The engine exists, or it or the timing cache cannot be written.
    """
    progress = progress or Progress()
    _refuse_other_sizes(attention, profiles)
    target = resolve_target(
        directory,
        manifest,
        precision=precision,
        backend=backend,
        compute_capabilities=compute_capabilities,
        device=device,
        options=options,
        progress=progress,
    )
    refuse_options(
        BuildRequest(
            target=target,
            module=import_tensorrt(target.backend),
            timing_cache=timing_cache,
            # Asked only where it matters: TensorRT-RTX builds beside a driver that does not work, too.
            has_gpu=target.options.takes_weights and current_gpu(device or 0) is not None,
        )
    )
    timings = timing_cache_for(target, timing_cache)
    if timings is not None:
        timings.refuse_unsafe()
    sweep(directory)
    engine = directory / PLANS / target.engine_name
    # An engine without a sidecar is what a killed build left, and opens nowhere.
    if engine.exists() and sidecar_path(engine).exists() and not force:
        raise already_there(engine, manifest, (profiles, slots))
    graph = _graph_for(target, directory, manifest, check=check, progress=progress)
    _refuse_failed_parity(graph, directory, manifest, check=check, progress=progress)
    choose = functools.partial(
        choose_lowering,
        attention,
        target,
        config=manifest.config,
        library=plugin_library or default_library(),
        is_named=plugin_library is not None,
        progress=progress,
    )
    lowering = choose(in_slots=bool(slots) or all(each.slots is not None for each in profiles))
    if slots and lowering.in_slots:
        profiles = slots
    elif slots:
        # The fallbacks too are of the sizes of images that follow one another.
        lowering = choose(in_slots=False)
    profiles = [checked_profile(profile, manifest.config) for profile in profiles]
    record_name = sidecar_path(engine).name
    with (
        new_files(engine.parent, name=engine.name, last=record_name) as new,
        timing_on(target, device),
    ):
        built = first_that_builds(
            attempts_from_lowering(
                lowering, precision=target.precision, parser=parser_version(target)
            ),
            lambda attempt: _plan_of(
                attempt, target, directory / graph, manifest, profiles, timings, progress
            ),
            progress,
        )
        progress.step("writing the engine")
        record = record_of(engine, target, graph, built, manifest, profiles)
        write_engine(new, engine, built, record)
    remove_stale(engine, record)
    trust(engine, record, progress)
    note_what_is_odd(record, progress)
    # What was measured on an engine of this name was measured on another one.
    if f"{PLANS}/{engine.name}" in manifest.parity:
        manifest.update(directory, without_parity=f"{PLANS}/{engine.name}")
    return engine, record


def _refuse_other_sizes(attention: AttentionWay, profiles: Sequence[Profile]) -> None:
    """Refuse sizes that are not those of the way: slots, or patches in one sequence."""
    rows = {profile.rows_per_slot for profile in profiles}
    wanted = SLOT_WAYS.get(attention)
    if wanted is not None and rows != {wanted}:
        raise EngineError(
            f"{attention} attention is for buckets of slots with {wanted} row(s) of grid_thw each, "
            f"got {', '.join(str(row or 'none') for row in rows)}",
            hint="give pairs, slots x patches: --buckets 1x1024,8x1024",
        )
    if wanted is None and rows != {None} and (attention != "auto" or rows != {2}):
        raise EngineError(
            f"{attention} attention is for images that follow one another, got buckets of slots",
            hint="give sizes in patches, --buckets 1024,4096, or choose --attention uniform",
        )


def _graph_for(
    target: BuildTarget, directory: Path, manifest: Manifest, *, check: bool, progress: Progress
) -> str:
    """Name of the graph to build from, its files verified, or derived now."""
    progress.step("verifying the graph's files")
    if PRECISIONS[target.precision].is_quantized:
        graph = flavour_graph(target.precision)
        manifest.verify(directory, (graph, f"{graph}.data"))
        return graph
    if target.precision != manifest.precision:
        return derive_fp16(directory, manifest, check=check, progress=progress)
    manifest.verify(directory, (GRAPH, DATA))
    return GRAPH


def _refuse_failed_parity(
    graph: str, directory: Path, manifest: Manifest, *, check: bool, progress: Progress
) -> None:
    """Refuse a graph that failed, or was derived from one that did; note one not compared."""
    if graph not in manifest.parity:
        progress.note(
            f"{graph} has not been compared with PyTorch yet: mmvision parity --model {directory}"
        )
    for name in dict.fromkeys((GRAPH, graph)):
        if check and (failure := failed_comparison(name, manifest.parity)) is not None:
            raise EngineError(
                failure,
                hint=f"see: mmvision parity --model {directory}; the failure stands until the same "
                "sample passes or the graph changes; --no-check builds it anyway",
            )


def _plan_of(
    attempt: Attempt,
    target: BuildTarget,
    graph: Path,
    manifest: Manifest,
    profiles: Sequence[Profile],
    timing_cache: TimingCache | None,
    progress: Progress,
) -> Plan:
    if attempt.lowering.library is not None:
        path, library = attempt.lowering.library
        load_plugin_library(import_tensorrt(target.backend), path, library.library.sha256)
    progress.step("lowering the graph")
    lowered = lowered_model(
        graph, attempt.lowering, parser_version(target), layer_norms=attempt.layer_norms
    )
    request = PlanRequest(
        model=ir.serde.serialize_model(lowered).SerializeToString(),
        location=graph,
        target=target,
        profiles=profiles,
        patch_dim=manifest.config.patch_dim,
        timing_cache=timing_cache,
    )
    return plan_from_model(request, decomposable=attempt.decomposable, progress=progress)
