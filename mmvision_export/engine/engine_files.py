"""An engine's files in `plans/`: told apart from what is there, described, written and trusted."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.artifacts.companion_file import CompanionFile, PluginFile
from mmvision_export.artifacts.engine_record import EngineRecord, GraphRecord, sidecar_path
from mmvision_export.artifacts.layer_counts import counts_from_layers, layers_of, layers_path
from mmvision_export.artifacts.manifest import PLANS, Manifest
from mmvision_export.artifacts.profile import Profile, checked_profile
from mmvision_export.core.errors import ManifestError, OutputError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import record_built
from mmvision_export.engine.attempts import Built
from mmvision_export.version import __version__

__all__ = [
    "already_there",
    "note_what_is_odd",
    "record_of",
    "remove_stale",
    "trust",
    "write_engine",
]

_LARGEST_PLAN = 1.2  # times the weights


def already_there(
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
    if record.other_graph(manifest) is not None:
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


def record_of(
    engine: Path,
    target: BuildTarget,
    graph: str,
    built: Built,
    manifest: Manifest,
    profiles: Sequence[Profile],
) -> EngineRecord:
    """The sidecar of an engine that was just built.

    Args:
        engine: Its path.
        target: What it was built with and for.
        graph: Name of the graph it was built from.
        built: How, and its plan.
        manifest: The model directory's.
        profiles: Accepted sizes.
    """
    plan = built.plan
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
        engine=FileRecord.of(plan.content),
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
        options=target.options,
        refit_graph=(
            CompanionFile(_refit_path(engine).name, FileRecord.of(plan.model))
            if target.options.takes_weights
            else None
        ),
        layers=(
            None
            if plan.layers is None
            else counts_from_layers(
                layers_of(json.loads(plan.layers)),
                file=CompanionFile(layers_path(engine).name, FileRecord.of(plan.layers)),
                source="builder" if target.backend == "tensorrt-rtx" else "engine inspector",
            )
        ),
    )


def _refit_path(engine: Path) -> Path:
    """Where the graph is by which an engine gets its weights."""
    return engine.with_suffix(".refit.onnx")


def write_engine(new: Path, engine: Path, built: Built, record: EngineRecord) -> None:
    """Write an engine, its sidecar and what lies beside it.

    Args:
        new: A folder whose files are moved to their places together.
        engine: The engine's place.
        built: How it was built, and its plan.
        record: The sidecar.
    """
    (new / engine.name).write_bytes(built.plan.content)
    record.write(new / sidecar_path(engine).name)
    library = built.attempt.lowering.library
    if record.plugin_library is not None and library is not None:
        # Beside the engine, so that its folder is all there is to copy.
        shutil.copyfile(library[0], new / record.plugin_library.name)
    if record.refit_graph is not None:
        (new / record.refit_graph.name).write_bytes(built.plan.model)
    if record.layers is not None and built.plan.layers is not None:
        (new / record.layers.file.name).write_bytes(built.plan.layers)


def remove_stale(engine: Path, record: EngineRecord) -> None:
    """Remove what lay beside an engine of this name before, and is not part of this one."""
    if record.layers is None:
        layers_path(engine).unlink(missing_ok=True)


def trust(engine: Path, record: EngineRecord, progress: Progress) -> None:
    """Remember that this user built the engine, and chose the library that lies beside it."""
    files = {record.engine.sha256: engine}
    if (plugins := record.plugin_library) is not None:
        files[plugins.record.sha256] = engine.parent / plugins.name
    for sha256, path in files.items():
        if (obstacle := record_built(sha256, path)) is not None:
            progress.note(f"{path.name} opens only if you name it or pass --trust: {obstacle}")


def note_what_is_odd(record: EngineRecord, progress: Progress) -> None:
    """Note weights that are kept more than once, and attention that is not fused as it should be."""
    _note_repeated_weights(record, progress)
    layers = record.layers
    if layers is None or not record.attention.fused:
        return
    expected = record.config.num_hidden_layers * len(record.profiles)
    if layers.fused_attention < expected:
        progress.note(
            f"the engine has {layers.fused_attention} fused attention kernels, of {expected} that were "
            f"asked for: see {layers.file.name}"
        )


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
