"""Engines from a model directory's graph, with TensorRT or TensorRT-RTX.

Networks are strongly typed on every version. The types are those of the ONNX graph; no builder flag
changes one. How attention is written down is chosen here, in memory, for the TensorRT that will
parse it. With TensorRT-RTX neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.artifacts.engine_record import (
    EngineRecord,
    GraphRecord,
    PluginFile,
    sidecar_path,
)
from mmvision_export.artifacts.manifest import DATA, GRAPH, PLANS, Manifest, flavour_graph
from mmvision_export.artifacts.plugin_library import default_library
from mmvision_export.artifacts.profile import Profile, checked_profile
from mmvision_export.artifacts.verdicts import standing_failures
from mmvision_export.core.atomic import new_files, sweep
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError, OutputError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import record_built
from mmvision_export.core.user_folders import cache_folder, private_folder
from mmvision_export.engine.attempts import (
    Attempt,
    Built,
    attempts_from_lowering,
    first_that_builds,
)
from mmvision_export.engine.attention import choose_lowering, lowered_model
from mmvision_export.engine.builder import PlanRequest, plan_from_model
from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay, TensorRTChoice
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.parser_support import parser_version
from mmvision_export.engine.target import resolve_target, timing_on
from mmvision_export.runtime.backends.plugin_library import load_plugin_library
from mmvision_export.runtime.backends.tensorrt import import_tensorrt
from mmvision_export.version import __version__

__all__ = ["build_engine"]

_LARGEST_PLAN = 1.2  # times the weights


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
        check: Compare a newly derived float16 graph with the float32 one in ONNX Runtime before
            building from it, and refuse a graph that failed its comparison with PyTorch.
        force: Replace an engine of the same name.
        progress: Told about each step.

    Returns:
        The engine's path and its sidecar's content.

    Raises:
        ManifestError: Files of the model directory are missing or damaged.
        BackendError: TensorRT is not installed, or there is no such device.
        EngineError: The request cannot be met, the graph was not parsed, or the engine was not
            built.
        OutputError: The engine exists, or cannot be written.
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
        progress=progress,
    )
    sweep(directory)
    engine = directory / PLANS / target.engine_name
    # An engine without a sidecar is what a killed build left, and opens nowhere.
    if engine.exists() and sidecar_path(engine).exists() and not force:
        raise _already_there(engine, manifest, (profiles, slots))
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
                attempt, target, directory / graph, manifest, profiles, progress
            ),
            progress,
        )
        progress.step("writing the engine")
        record = _record(target, graph, built, manifest, profiles)
        _write(new, engine, built, record)
    _trust(engine, record, progress)
    _note_repeated_weights(record, progress)
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


def _already_there(
    engine: Path, manifest: Manifest, sizes: Sequence[Sequence[Profile]]
) -> OutputError:
    """The engine that has this name: whether it is what was asked for, or in what it differs."""
    keep = f"keep both by moving {engine.name} and its .json out of {PLANS}/, or replace it with --force"
    try:
        record = EngineRecord.read(engine)
    except ManifestError as error:
        return OutputError(
            f"{engine} already exists, and {error.message}", hint="--force replaces it"
        )
    name = record.graph.name
    digests = [
        manifest.files[each].sha256
        for each in (name, f"{name}.data", DATA)
        if each in manifest.files
    ]
    if not {record.graph.sha256, record.graph.data_sha256} <= set(digests):
        return OutputError(f"{engine} already exists, built from another graph", hint=keep)
    asked = [[checked_profile(each, manifest.config) for each in group] for group in sizes if group]
    if list(record.profiles) not in asked:
        there = "; ".join(map(str, record.profiles))
        return OutputError(f"{engine} already exists, built for other sizes: {there}", hint=keep)
    return OutputError(
        f"{engine} already exists, built from this graph for these sizes",
        hint="use it, or replace it with --force",
        reason="exists",
    )


def _refuse_failed_parity(
    graph: str, directory: Path, manifest: Manifest, *, check: bool, progress: Progress
) -> None:
    """Refuse a graph that failed, or was derived from one that did; note one not compared."""
    if graph not in manifest.parity:
        progress.note(
            f"{graph} has not been compared with PyTorch yet: mmvision parity --model {directory}"
        )
    for name in dict.fromkeys((GRAPH, graph)):
        entry = manifest.parity.get(name, {"passed": True})
        if check and not entry.get("passed"):
            standing = "; ".join(verdict.describe() for verdict in standing_failures(entry))
            raise EngineError(
                f"{name} did not pass its comparison with PyTorch"
                + (f": {standing}" if standing else ""),
                hint=f"see: mmvision parity --model {directory}; the failure stands until the same "
                "sample passes or the graph changes; --no-check builds it anyway",
            )


def _plan_of(
    attempt: Attempt,
    target: BuildTarget,
    graph: Path,
    manifest: Manifest,
    profiles: Sequence[Profile],
    progress: Progress,
) -> bytes:
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
        timing_cache=_timing_cache(target),
    )
    return plan_from_model(request, decomposable=attempt.decomposable, progress=progress)


def _timing_cache(target: BuildTarget) -> Path | None:
    """The file of a TensorRT's timings on one GPU; TensorRT-RTX times nothing when it builds.

    TensorRT itself refuses the timings of another compute capability only.
    """
    if target.gpu is None:
        return None
    # It holds compiled kernels too (NvInfer.h, BuilderFlag::kDISABLE_COMPILATION_CACHE), so that it is
    # in the user's own folder, where nobody else can put one.
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder = private_folder(folder / "timing")
    except OSError:
        return None
    return folder / f"{target.backend}-{target.tensorrt_version}-{target.gpu.file_name}"


def _record(
    target: BuildTarget,
    graph: str,
    built: Built,
    manifest: Manifest,
    profiles: Sequence[Profile],
) -> EngineRecord:
    lowering = built.attempt.lowering
    library = lowering.library
    return EngineRecord(
        backend=target.backend,
        tensorrt_version=target.tensorrt_version,
        compute_capabilities=target.compute_capabilities,
        platform=target.platform,
        precision=target.precision,
        attention=lowering.attention(fused=built.attempt.fused),
        profiles=tuple(profiles),
        graph=GraphRecord(
            name=graph,
            sha256=manifest.files[graph].sha256,
            data_sha256=manifest.files[f"{graph}.data"].sha256,
            data_bytes=manifest.files[f"{graph}.data"].size_bytes,
        ),
        engine=FileRecord.of(built.plan),
        plugin_library=None if library is None else PluginFile.of(library[1].library),
        config=manifest.config,
        versions={
            "mmvision-export": __version__,
            "polygraphy": importlib.metadata.version("polygraphy"),
            "onnx": importlib.metadata.version("onnx"),
        },
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        passed_over=built.passed_over,
        gpu=target.gpu,
    )


def _trust(engine: Path, record: EngineRecord, progress: Progress) -> None:
    """Remember that this user built the engine, and chose the library that lies beside it."""
    files = {record.engine.sha256: engine}
    if (plugins := record.plugin_library) is not None:
        files[plugins.record.sha256] = engine.parent / plugins.name
    for sha256, path in files.items():
        if (obstacle := record_built(sha256, path)) is not None:
            progress.note(f"{path.name} opens only if you name it or pass --trust: {obstacle}")


def _note_repeated_weights(record: EngineRecord, progress: Progress) -> None:
    ratio = record.plan_per_weights
    if ratio is None or ratio <= _LARGEST_PLAN or len(record.profiles) == 1:
        return
    assert record.graph.data_bytes is not None
    progress.note(
        f"the engine has {record.engine.size_bytes / 1e6:.1f} MB for "
        f"{record.graph.data_bytes / 1e6:.1f} MB of weights, {ratio:.2f} times as much; at "
        f"most {_LARGEST_PLAN} is expected. Its {len(record.profiles)} profiles have kernels of "
        "their own, which are large beside small weights, or keep the weights once more. Fewer "
        "--buckets or a newer TensorRT make the engine smaller"
    )


def _write(new: Path, engine: Path, built: Built, record: EngineRecord) -> None:
    (new / engine.name).write_bytes(built.plan)
    record.write(new / sidecar_path(engine).name)
    library = built.attempt.lowering.library
    if record.plugin_library is not None and library is not None:
        # Beside the engine, so that its folder is all there is to copy.
        shutil.copyfile(library[0], new / record.plugin_library.name)
