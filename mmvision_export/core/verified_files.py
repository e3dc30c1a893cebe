"""Large files are hashed when they are opened first, and that is remembered.

Two checkpoints have the same graph and weights of the same size: only the hash tells a copy that
was half updated. Hashing gigabytes takes seconds, so that the user's cache keeps for each file what
it was when its hash was read: size, time of change, and its place on the disk. As long as these stay the
file is taken to be the same. Whoever writes over a file in place and sets its time back can pass.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, get_args

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import ManifestError, OutputError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.progress import Progress
from mmvision_export.core.user_folders import cache_folder, private_folder

__all__ = ["VERIFY", "Verify", "remember_verified", "verify_file"]

Verify = Literal["once", "always", "never"]
"""When a large file is hashed: where nothing is remembered of it, at each opening, or never."""

VERIFY: tuple[Verify, ...] = get_args(Verify)

_FOLDER = "verified"
_PIECE = 1 << 24


def verify_file(
    record: FileRecord,
    path: Path,
    *,
    said_by: str,
    when: Verify = "once",
    progress: Progress | None = None,
) -> None:
    """Check that a large file is the one of its record.

    Args:
        record: Its hash and size.
        path: The file.
        said_by: What an error calls the place that the record is from.
        when: Whether a hash that was read before will do. The size is always compared.
        progress: Told that the file is hashed, and how far that is, in megabytes.

    Raises:
        ManifestError: It is missing, or has another length or content.
    """
    record.verify_size(path, said_by=said_by)
    if when == "never" or (when == "once" and _remembered(path) == record.sha256):
        return
    before = _identity(path)
    progress = progress or Progress()
    often = ", once" if when == "once" else ""
    progress.step(f"verifying {path.name}{often} (MB)", total=record.size_bytes / 1e6)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            progress.advance(len(piece) / 1e6)
    if digest.hexdigest() != record.sha256:
        raise ManifestError(
            f"{path} has sha256 {digest.hexdigest()}, {said_by} says {record.sha256}",
            hint="the file was changed or damaged: copy or make it again",
        )
    if _identity(path) == before:
        remember_verified(path, record.sha256)


def remember_verified(path: Path, sha256: str) -> None:
    """Remember the hash of a file that was just read or written.

    Where it cannot be remembered, the file is hashed again the next time.
    """
    entry = _entry(path)
    if entry is None:
        return
    try:
        content = json.dumps({"path": str(path.resolve()), **_identity(path), "sha256": sha256})
        private_folder(entry.parent)
        with new_files(entry.parent, name=entry.name) as new:
            (new / entry.name).write_text(content, encoding="utf-8", errors="surrogateescape")
    except (OSError, OutputError):
        return


def _remembered(path: Path) -> str | None:
    """The hash of a file that is as it was when its hash was read; None if that is not known."""
    entry = _entry(path)
    if entry is None:
        return None
    try:
        content = json.loads(entry.read_text(encoding="utf-8", errors="surrogateescape"))
        is_same = {name: content[name] for name in _identity(path)} == _identity(path)
        return str(content["sha256"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(path: Path) -> dict[str, int]:
    """What changes when a file is written to or replaced. Nanoseconds."""
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _entry(path: Path) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / _FOLDER / f"{name[:32]}.json"
