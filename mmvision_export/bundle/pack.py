"""Make a bundle of a model directory."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.artifacts.deployment import Deployment
from mmvision_export.artifacts.library_record import Machine
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.bundle.archive import refuse_root, write_archive
from mmvision_export.bundle.contents import library_part, model_part
from mmvision_export.bundle.record import CHECKSUMS, EXECUTABLES, SAMPLE_FILES, WHEELS, BundleRecord
from mmvision_export.bundle.scripts import install_script, readme, verify_script
from mmvision_export.bundle.wheel import own_wheel
from mmvision_export.core.atomic import new_files, refuse_unwritable
from mmvision_export.core.errors import InputError, OutputError
from mmvision_export.core.files import FileRecord, file_record
from mmvision_export.core.progress import Progress
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.runtime.vision_encoder import VisionEncoder
from mmvision_export.version import __version__

__all__ = ["Bundle", "write_bundle"]

_SUFFIX = ".tar"
# In merge blocks: a still image, a narrow one, and two pairs of frames of a video.
_SAMPLE = ((1, 8, 8), (1, 2, 9), (2, 4, 5))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What was written.

    Attributes:
        path: The archive.
        size_bytes: Its size.
        record: Its files.
        engines: Names of the engines in it.
        has_library: Whether it has a plugin library.
    """

    path: Path
    size_bytes: int
    record: BundleRecord
    engines: list[str]
    has_library: bool


def write_bundle(
    directory: Path,
    manifest: Manifest,
    output: Path,
    deployment: Deployment,
    *,
    machine: Machine | None = None,
    precision: str = "fp16",
    build: Mapping[str, Any] | None = None,
    plugin_library: Path | None = None,
    wheels: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the archive of a model for one kind of machine.

    The same input gives the same bytes: the same model directory, package and wheels, on the same kind of
    processor, which computes the stored embeddings.

    Args:
        directory: The model directory.
        manifest: Its manifest.
        output: The archive, `<name>.tar`.
        deployment: What it is for.
        machine: Its CPU; the usual one of such a machine if None. A bundle for a CPU is for any.
        precision: Of the engine; of no matter for a CPU.
        build: Options of `mmvision build-engine` on the target, by name without dashes.
        plugin_library: `libmmvision_plugins.so` for the target, with its record beside it.
        wheels: Folder of wheels, for a target without a network: pip takes packages from it alone.
        force: Replace an archive that is there.
        progress: Told about each step.

    Raises:
        ManifestError: A file of the model is missing or changed, or a graph failed its comparison.
        InputError: The folder of wheels has none.
        OutputError: The archive exists, or cannot be written.
        BackendError: ONNX Runtime, which computes the stored embeddings, is not installed.
    """
    progress = progress or Progress()
    if output.suffix != _SUFFIX:
        raise OutputError(f"a bundle is a {_SUFFIX} file, got --output {output}")
    refuse_root(output.stem)
    if output.exists() and not force:
        raise OutputError(
            f"{output} already exists",
            hint="choose another --output, or replace it with --force",
            reason="exists",
        )
    refuse_unwritable(output.parent)
    is_gpu = deployment.tensorrt is not None
    machine = machine or (deployment.machines[0] if is_gpu else None)
    if machine is not None and machine not in deployment.machines:
        raise OutputError(
            f"{deployment.title} has a CPU of {' or '.join(deployment.machines)}, got {machine}"
        )
    packages = {} if wheels is None else _packages(wheels)
    part = model_part(
        directory, manifest, deployment, machine, precision if is_gpu else "fp32", progress=progress
    )
    sources = dict(part.sources)
    if plugin_library is not None and machine is not None:
        sources |= library_part(plugin_library, deployment, machine)
    progress.step("encoding the sample that verifies the target")
    graph, sample = _sample(directory, manifest, progress)
    wheel, content = own_wheel()
    sources |= sample | packages | {f"{WHEELS}/{wheel}": content}
    sources |= {
        EXECUTABLES[0]: install_script(
            deployment, machine, wheel, has_all_wheels=wheels is not None
        ),
        EXECUTABLES[1]: verify_script(deployment),
        "README.txt": readme(
            deployment,
            model=directory.resolve().name,
            version=__version__,
            has_all_wheels=wheels is not None,
            has_engine=is_gpu,
        ),
    }
    progress.step("hashing")
    files = {path: part.records.get(path) or _recorded(sources[path]) for path in sources}
    sources[CHECKSUMS] = "".join(
        f"{files[path].sha256}  {path}\n" for path in sorted(files)
    ).encode()
    files[CHECKSUMS] = _recorded(sources[CHECKSUMS])
    record = BundleRecord(
        target=deployment.name,
        machine=machine,
        model=directory.resolve().name,
        version=__version__,
        precision=precision if is_gpu else part.manifest.precision,
        build=_arguments(precision, deployment, build or {}) if is_gpu else [],
        sample_graph=graph,
        files=dict(sorted(files.items())),
    )
    with new_files(output.parent, name=output.name) as new:
        write_archive(new / output.name, output.stem, record, sources, progress=progress)
        size_bytes = (new / output.name).stat().st_size
    return Bundle(output, size_bytes, record, part.engines, plugin_library is not None)


def _recorded(source: Path | bytes) -> FileRecord:
    return FileRecord.of(source) if isinstance(source, bytes) else file_record(source)


def _packages(folder: Path) -> dict[str, Path | bytes]:
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise InputError(
            f"{folder} has no wheels",
            hint="fill it with: pip download --dest FOLDER 'mmvision-export[cpu]'",
        )
    # Its own comes from the files that are running.
    return {
        f"{WHEELS}/{path.name}": path
        for path in found
        if not path.name.startswith("mmvision_export-")
    }


def _sample(
    directory: Path, manifest: Manifest, progress: Progress
) -> tuple[str, dict[str, Path | bytes]]:
    """The graph that encoded the sample, and the sample's files."""
    pixel_values, grid_thw = sample_batch(_SAMPLE, manifest.config, seed=0)
    # One thread: the order of sums, and so the last bit, is the same whatever the number of cores.
    with VisionEncoder.open(
        directory, backend="onnxruntime-cpu", threads=1, progress=progress
    ) as encoder:
        image_embeds = encoder(pixel_values, grid_thw)
        graph = encoder.facts.graph or ""
    arrays: tuple[np.ndarray[Any, Any], ...] = (
        pixel_values,
        grid_thw,
        np.asarray(image_embeds, np.float32),
    )
    return graph, {name: _npy(array) for name, array in zip(SAMPLE_FILES, arrays, strict=True)}


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _arguments(precision: str, deployment: Deployment, build: Mapping[str, Any]) -> list[str]:
    arguments = [f"--{precision}"] if precision != "fp32" else []
    arguments += ["--backend", str(deployment.tensorrt)]
    for name, value in build.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments
