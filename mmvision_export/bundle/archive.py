"""The archive of a bundle: a tar file of which every byte follows from its content.

Names come in the order of `BUNDLE.json`, which is the first. Times, owners and groups are the same in
every archive, so that the same content gives the same bytes. And so a reader needs no parser of tar
files: it compares each header, each padding and the end with what it would have written.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mmvision_export.bundle.record import BUNDLE, EXECUTABLES, MOST_RECORD_BYTES, BundleRecord
from mmvision_export.core.errors import ManifestError, OutputError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.progress import Progress
from mmvision_export.core.regular_file import opened_regular_file

__all__ = ["archive_problems", "refuse_root", "write_archive"]

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 22
# 1980-01-01: the earliest time that zip files know too. tar warns of times near 0.
_TIME = 315_532_800
_MOST_ROOT = 64


def refuse_root(root: str) -> None:
    """Refuse a folder's name that a tar header has no room for.

    Raises:
        OutputError: It is too long, or no name.
    """
    if not root or "/" in root or root in (".", "..") or len(root.encode()) > _MOST_ROOT:
        raise OutputError(
            f"the name of a bundle must have 1 to {_MOST_ROOT} bytes, got {root!r}",
            hint="choose a shorter --output",
        )


def write_archive(
    path: Path,
    root: str,
    record: BundleRecord,
    sources: Mapping[str, Path | bytes],
    *,
    progress: Progress | None = None,
) -> None:
    """Write a bundle.

    Args:
        path: Of the archive.
        root: Name of the folder that it unpacks to.
        record: Of its files.
        sources: The content of each, in memory or as a file.
        progress: Told about it, in megabytes.

    Raises:
        ManifestError: A file is another by now than when it was recorded.
    """
    progress = progress or Progress()
    progress.step(f"writing {path.name} (MB)", total=record.size_bytes / 1e6)
    with path.open("wb") as archive:
        _write(archive, f"{root}/{BUNDLE}", FileRecord.of(record.text), record.text, progress)
        for name, each in record.files.items():
            _write(archive, f"{root}/{name}", each, sources[name], progress)
        archive.write(_end_of(archive.tell()))


def _write(
    archive: BinaryIO, name: str, record: FileRecord, source: Path | bytes, progress: Progress
) -> None:
    archive.write(_header(name, record.size_bytes))
    digest, written = hashlib.sha256(), 0
    for piece in _pieces(source):
        digest.update(piece)
        archive.write(piece)
        written += len(piece)
        progress.advance(len(piece) / 1e6)
    if (digest.hexdigest(), written) != (record.sha256, record.size_bytes):
        raise ManifestError(f"{name} changed while it was packed", hint="run the command again")
    archive.write(_padding_of(record.size_bytes))


def _pieces(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = 0o755 if name.endswith(tuple(f"/{each}" for each in EXECUTABLES)) else 0o644
    info.mtime = _TIME
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padding_of(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK)


def _end_of(position: int) -> bytes:
    """Two empty blocks, and more up to a whole record of tar's."""
    end = 2 * _BLOCK
    return bytes(end + -(position + end) % tarfile.RECORDSIZE)


def archive_problems(
    path: Path, *, progress: Progress | None = None
) -> tuple[BundleRecord | None, dict[str, str]]:
    """What of an archive is not as it was written.

    Nothing is unpacked, and nothing of its content is run or parsed but `BUNDLE.json`.

    Returns:
        The record, or None if it cannot be read; by name of the file what is wrong with it.

    Raises:
        InputError: There is no such file, or it is none.
    """
    progress = progress or Progress()
    with opened_regular_file(path) as archive:
        root, record, why = _record_of(archive)
        if record is None:
            return None, {BUNDLE: why}
        progress.step(f"verifying {path.name} (MB)", total=record.size_bytes / 1e6)
        problems: dict[str, str] = {}
        for name, each in record.files.items():
            found = _problem_of(archive, f"{root}/{name}", each, progress)
            if found is not None:
                problems[name] = found
        if (rest := archive.read(2 * tarfile.RECORDSIZE)) != _end_of(archive.tell() - len(rest)):
            problems.setdefault(path.name, "its end is not that of the archive")
        return record, problems


def _record_of(archive: BinaryIO) -> tuple[str, BundleRecord | None, str]:
    """The archive's folder and its record, or why there is none."""
    header = archive.read(_BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return "", None, "the archive does not begin with a tar header"
    root, _, name = info.name.partition("/")
    if name != BUNDLE or not 0 < info.size <= MOST_RECORD_BYTES:
        return "", None, f"the archive does not begin with {BUNDLE}"
    if header != _header(info.name, info.size):
        return "", None, "its tar header was changed"
    text = archive.read(info.size)
    padding = archive.read(-info.size % _BLOCK)
    if len(text) != info.size or padding != _padding_of(info.size):
        return "", None, "it is cut short, or what follows it was changed"
    try:
        return root, BundleRecord.parsed(text, Path(BUNDLE)), ""
    except ManifestError as error:
        return "", None, f"changed or damaged ({error.reason or 'content'})"


def _problem_of(archive: BinaryIO, name: str, record: FileRecord, progress: Progress) -> str | None:
    header = _header(name, record.size_bytes)
    header_is_same = archive.read(len(header)) == header
    digest, left = hashlib.sha256(), record.size_bytes
    while left and (piece := archive.read(min(left, _PIECE))):
        digest.update(piece)
        left -= len(piece)
        progress.advance(len(piece) / 1e6)
    padding = _padding_of(record.size_bytes)
    padding_is_same = archive.read(len(padding)) == padding
    if left:
        return f"the archive ends within it: {left} of {record.size_bytes} bytes are missing"
    if digest.hexdigest() != record.sha256:
        return f"has sha256 {digest.hexdigest()}, {BUNDLE} says {record.sha256}"
    if not header_is_same:
        return "its tar header was changed"
    if not padding_is_same:
        return "what fills its last block was changed"
    return None
