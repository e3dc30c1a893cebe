"""Which files of a model directory a target needs, and where they lie in the bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from mmvision_export.artifacts.deployment import Deployment
from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.graph_variants import data_of
from mmvision_export.artifacts.library_record import Machine, library_record_path
from mmvision_export.artifacts.manifest import (
    CPU_GRAPH,
    DATA,
    GRAPH,
    MANIFEST,
    PLANS,
    Manifest,
    flavour_graph,
)
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.artifacts.verdicts import failed_comparison
from mmvision_export.bundle.record import BUNDLE_MODEL, BUNDLE_PLUGINS
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.core.records import read_record
from mmvision_export.core.verified_files import verify_file
from mmvision_export.models.minimax_m3_vl.preprocessor_config import PREPROCESSOR

__all__ = ["ModelPart", "library_part", "model_part"]

_LONG_BYTES = 64 << 20
"""Hashing less is over before anybody reads what is done."""


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """The files of a model directory that go into a bundle.

    Attributes:
        sources: By path in the bundle.
        records: Hash and size of those that were verified, by path in the bundle.
        manifest: What the directory's manifest says of them.
        engines: Names of the engines among them.
    """

    sources: dict[str, Path | bytes]
    records: dict[str, FileRecord]
    manifest: Manifest
    engines: list[str]


def model_part(
    directory: Path,
    manifest: Manifest,
    deployment: Deployment,
    machine: Machine | None,
    precision: str,
    *,
    progress: Progress,
) -> ModelPart:
    """What of a model directory a target needs.

    A CPU gets every graph that a CPU runs. A GPU gets the portable graph and its weights, which the
    graph for a CPU shares; the graph of the precision that its engine has, if it is there; and the
    engines that are valid in such a machine.

    Args:
        directory: The model directory.
        manifest: Its manifest.
        deployment: The target.
        machine: CPU of the target; None for any.
        precision: Of the engine.
        progress: Told about hashing and about what is left out.

    Raises:
        ManifestError: A file is missing, changed or no regular file, or a graph failed its comparison.
    """
    engines = [*_engines(directory, manifest, deployment, machine, precision, progress)]
    graphs = [
        name
        for name in manifest.files
        if name.endswith(".onnx") and _is_needed(name, deployment, precision)
    ]
    graphs += [record.graph.name for _, record in engines if record.graph.name not in graphs]
    _refuse_failed(directory, manifest, graphs, progress)
    names = {GRAPH, DATA, PREPROCESSOR, *graphs, *map(data_of, graphs)}
    kept = {name: record for name, record in manifest.files.items() if name in names}
    for name, file in kept.items():
        if name.endswith(".onnx"):  # what it reads its weights from is checked too
            manifest.verify(directory, [name])
            continue
        path = manifest.path_of(directory, name)
        told = progress if file.size_bytes > _LONG_BYTES else None
        verify_file(file, path, said_by="the manifest", progress=told)
    sources: dict[str, Path | bytes] = {f"{BUNDLE_MODEL}/{name}": directory / name for name in kept}
    records = {f"{BUNDLE_MODEL}/{name}": record for name, record in kept.items()}
    subjects = {*graphs, *(f"{PLANS}/{path.name}" for path, _ in engines)}
    part = dataclasses.replace(
        manifest,
        files=kept,
        parity={name: each for name, each in manifest.parity.items() if name in subjects},
        quantization={n: each for n, each in manifest.quantization.items() if n in graphs},
    )
    sources[f"{BUNDLE_MODEL}/{MANIFEST}"] = part.text.encode()
    for path, record in engines:
        plans = f"{BUNDLE_MODEL}/{PLANS}"
        sources |= {f"{plans}/{file.name}": file for file in record.verified_files(path)}
        records |= {f"{plans}/{file.name}": each for file, each in record.parts(path).items()}
    return ModelPart(sources, records, part, [path.name for path, _ in engines])


def _is_needed(graph: str, deployment: Deployment, precision: str) -> bool:
    if deployment.tensorrt is not None:
        return graph in (GRAPH, CPU_GRAPH, flavour_graph(precision))
    # Those of a GPU's precisions have weights of their own, which no CPU reads.
    return graph not in {flavour_graph(each) for each in PRECISIONS}


def _engines(
    directory: Path,
    manifest: Manifest,
    deployment: Deployment,
    machine: Machine | None,
    precision: str,
    progress: Progress,
) -> Iterable[tuple[Path, EngineRecord]]:
    """The engines that are valid in such a machine, with their records."""
    for engine in sorted((directory / PLANS).glob("*.engine")):
        if not sidecar_path(engine).is_file():
            continue  # what a killed build left
        record = EngineRecord.read(engine)
        other = record.other_graph(manifest)
        reasons = {
            f"it is for {record.backend}": record.backend != deployment.tensorrt,
            f"it is for {record.platform}": record.platform != f"linux-{machine}",
            f"it is for compute capability {', '.join(map(str, record.compute_capabilities))}": not any(
                map(deployment.has_gpu, record.compute_capabilities)
            ),
            f"it is {record.precision}": record.precision != precision,
            f"it was {other}": other is not None,
        }
        reason = next((reason for reason, is_so in reasons.items() if is_so), None)
        if reason is None:
            yield engine, record
        elif deployment.tensorrt is not None:
            progress.note(f"{engine.name} stays here: {reason}")


def _refuse_failed(
    directory: Path, manifest: Manifest, graphs: Iterable[str], progress: Progress
) -> None:
    """Refuse graphs that failed a comparison; note those that have not been compared."""
    unknown = []
    for name in graphs:
        if name not in manifest.parity:
            unknown.append(name)
        elif (failure := failed_comparison(name, manifest.parity)) is not None:
            raise ManifestError(failure, hint=f"see: mmvision parity --model {directory}")
    if unknown:
        progress.note(
            f"not compared with PyTorch: {', '.join(unknown)}; compare with: mmvision parity --model {directory}"
        )


def library_part(
    library: Path, deployment: Deployment, machine: Machine
) -> dict[str, Path | bytes]:
    """The plugin library and its record, in the bundle's own folder.

    Raises:
        ManifestError: One is missing or damaged, or the library is for another CPU or other GPUs.
    """
    path = library_record_path(library)
    build = f"build one with: {PluginLibraryRecord.BUILD} --machine {machine}"
    if not library.is_file():
        raise ManifestError(f"{library}: no such plugin library", hint=build, reason="missing")
    record = read_record(
        PluginLibraryRecord, path, what="the record of a plugin library", formats=(1,), hint=build
    )
    record.library.verify(library, said_by="its record")
    if record.machine != machine:
        raise ManifestError(
            f"{library} is for {record.machine}, the target has {machine}", hint=build
        )
    if not any(map(deployment.has_gpu, record.compute_capabilities)):
        gpus = ", ".join(map(str, record.compute_capabilities))
        raise ManifestError(
            f"{library} has kernels for compute capability {gpus}, none is {deployment.title}'s",
            hint=build,
        )
    return {f"{BUNDLE_PLUGINS}/{file.name}": file for file in (library, path)}
