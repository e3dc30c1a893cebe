"""What of a bundle, or of a model directory, is not as it was written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.manifest import MANIFEST, PLANS, Manifest
from mmvision_export.bundle.archive import archive_problems
from mmvision_export.bundle.record import BUNDLE, BundleRecord
from mmvision_export.core.errors import ManifestError, MmvisionError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.progress import Progress

__all__ = ["Integrity", "verify_files"]

Kind = Literal["archive", "bundle", "model directory"]


@dataclasses.dataclass(frozen=True)
class Integrity:
    """What a look at every file found.

    Attributes:
        kind: What it is.
        files: How many were compared with their hashes.
        size_bytes: Of them together.
        problems: By file, what is wrong with it.
        record: Of a bundle, if it can be read.
    """

    kind: Kind
    files: int
    size_bytes: int
    problems: dict[str, str]
    record: BundleRecord | None = None


def verify_files(path: Path, *, progress: Progress | None = None) -> Integrity:
    """Compare every file with the hash that was recorded when it was written.

    Hashes find damage. They prove nothing about the maker of a file. Nothing is loaded or run.

    Args:
        path: A bundle's archive, an unpacked bundle, or a model directory.
        progress: Told about it, in megabytes.

    Raises:
        ManifestError: It is none of them.
        InputError: The archive cannot be opened.
    """
    progress = progress or Progress()
    if not path.is_dir():
        record, problems = archive_problems(path, progress=progress)
        size = 0 if record is None else record.size_bytes
        return Integrity("archive", _count(record), size, problems, record)
    if (path / BUNDLE).is_file():
        try:
            record = BundleRecord.read(path)
        except ManifestError as error:
            return Integrity("bundle", 1, 0, {BUNDLE: error.message})
        problems = _compared(path, record.files, progress, said_by=BUNDLE)
        return Integrity("bundle", _count(record), record.size_bytes, problems, record)
    if not (path / MANIFEST).is_file():
        raise ManifestError(
            f"{path} is neither a bundle nor a model directory: it has no {BUNDLE} and no {MANIFEST}",
            reason="missing",
        )
    return _model_directory(path, progress)


def _count(record: BundleRecord | None) -> int:
    return 1 if record is None else len(record.files) + 1


def _compared(
    folder: Path, files: dict[str, FileRecord], progress: Progress, *, said_by: str
) -> dict[str, str]:
    """By name, what is wrong with files that a record lists."""
    progress.step(
        f"verifying {folder.resolve().name} (MB)",
        total=sum(record.size_bytes for record in files.values()) / 1e6,
    )
    problems: dict[str, str] = {}
    for name, record in files.items():
        path = folder / name
        inside = [path, *path.parents][: len(Path(name).parts)]
        if any(part.is_symlink() for part in inside):
            problems[name] = "is, or lies behind, a symbolic link"
        elif path.exists() and not path.is_file():
            problems[name] = "is not a regular file"
        else:
            with _noted(problems, name):
                record.verify(path, said_by=said_by)
        progress.advance(record.size_bytes / 1e6)
    return problems


def _model_directory(directory: Path, progress: Progress) -> Integrity:
    try:
        manifest = Manifest.read(directory)
    except ManifestError as error:
        return Integrity("model directory", 1, 0, {MANIFEST: error.message})
    problems = _compared(directory, manifest.files, progress, said_by="the manifest")
    for name in manifest.files:
        if name.endswith(".onnx") and name not in problems:
            with _noted(problems, name):  # it may read weights that no record lists
                manifest.verify(directory, [name])
    count, size_bytes = 1 + len(manifest.files), sum(r.size_bytes for r in manifest.files.values())
    for engine in sorted((directory / PLANS).glob("*.engine")):
        sidecar = sidecar_path(engine)
        if not sidecar.is_file():
            problems[f"{PLANS}/{engine.name}"] = (
                "has no record beside it, as a killed build leaves it"
            )
            continue
        with _noted(problems, f"{PLANS}/{sidecar.name}"):
            record = EngineRecord.read(engine)
            for part, expected in record.parts(engine).items():
                count, size_bytes = count + 1, size_bytes + expected.size_bytes
                with _noted(problems, f"{PLANS}/{part.name}"):
                    expected.verify(part, said_by="its record")
    return Integrity("model directory", count, size_bytes, problems)


@contextlib.contextmanager
def _noted(problems: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except (MmvisionError, OSError) as error:
        problems[name] = getattr(error, "message", str(error))
