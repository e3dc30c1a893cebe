"""Files: written whole or not at all, identified by size and hash, read as JSON or arrays.

What is being written lives under a temporary name beside its target, on the same file system, and
takes the target's place in one rename once it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError, ManifestError, OutputError

__all__ = [
    "FileRecord",
    "array_from_file",
    "file_record",
    "new_directory",
    "new_files",
    "read_json",
    "refuse_existing",
    "sha256_of",
]

# None is what NumPy and onnx-ir raise for a write that the disk took only a part of.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None}


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: Where the directory shall be; a symbolic link stands for what it points to. Missing
            parents are made.
        marker: A file that every directory of this kind has. One without it is somebody else's, and
            never replaced.
        force: Replace what is there; otherwise it is refused. The old directory stays until the new
            one is whole.

    Raises:
        OutputError: `path` exists and may not be replaced, or it cannot be written.
    """
    refuse_existing(path, marker=marker, force=force)
    if path.is_symlink():
        path = path.resolve()
    with _temporary_directory(path.parent, path.name) as temporary:
        yield temporary
        refuse_existing(path, marker=marker, force=force)  # it may have come into being meanwhile
        if not path.exists():
            temporary.rename(path)
            return
        old = temporary.with_suffix(".old")
        try:
            path.rename(old)
            temporary.rename(path)
        except BaseException:
            if not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path, *, name: str) -> Iterator[Path]:
    """A temporary directory whose files move into `folder` when the block ends well.

    They replace their namesakes.

    Args:
        folder: Where the files go. Missing folders are made.
        name: What is being written, for an error's message.

    Raises:
        OutputError: The files cannot be written.
    """
    with _temporary_directory(folder, name) as temporary:
        yield temporary
        # The largest first: a weight file before the graph that points into it.
        for file in sorted(temporary.iterdir(), key=lambda f: -f.stat().st_size):
            file.replace(folder / file.name)


def refuse_existing(path: Path, *, marker: str, force: bool) -> None:
    """Raise `OutputError` if `path` exists and `new_directory` would not replace it."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(
            f"{path} already exists",
            hint="choose another --output, or replace it with --force",
            reason="exists",
        )
    if not (path / marker).is_file():
        raise OutputError(
            f"{path} has no {marker}: --force replaces model directories only",
            hint="choose another --output",
        )


@contextlib.contextmanager
def _temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    temporary: Path | None = None
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new.", suffix=".partial", dir=parent))
        # mkdtemp makes a private directory; what takes a public place gets the permissions of any
        # new directory.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(
                f"{parent}: no space left while writing {name}",
                hint="free some space; nothing was kept",
                reason="no space",
            ) from error
        raise OutputError(f"{parent}: cannot write {name}: {error.strerror}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            # Empty only if the block failed.
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Identity of one file.

    Attributes:
        sha256: Lower-case hexadecimal digest.
        size_bytes: Its size.
    """

    sha256: str
    size_bytes: int

    def verify_size(self, path: Path, *, said_by: str) -> None:
        """Check that a file is there and as long as it should be.

        That finds an incomplete copy at no cost.

        Args:
            path: The file.
            said_by: What an error calls the place this record is from.

        Raises:
            ManifestError: It is missing, or has another length.
        """
        if not path.is_file():
            raise ManifestError(
                f"{path} is missing",
                hint="copy the whole model directory, or make it again",
                reason="missing",
            )
        if (size := path.stat().st_size) != self.size_bytes:
            raise ManifestError(
                f"{path} has {size} bytes, {said_by} says {self.size_bytes}",
                hint="the copy is incomplete, or the file was changed: copy or make it again",
            )

    def verify(self, path: Path, *, said_by: str) -> None:
        """Check that a file has this length and this content.

        Raises:
            ManifestError: See `verify_size`; or its hash is another.
        """
        self.verify_size(path, said_by=said_by)
        self._refuse_other_content(path, sha256_of(path), said_by)

    @contextlib.contextmanager
    def verified_map(self, path: Path, *, said_by: str) -> Iterator[mmap.mmap]:
        """A file in memory, read-only and verified, for the block.

        The pages that are hashed are those given. They are the system's cache of the file and no
        copy. That matters on a Jetson, where host and device share one memory. A file that is
        shortened meanwhile ends the process (SIGBUS), as any mapped file does.

        Raises:
            ManifestError: See `verify`.
        """
        self.verify_size(path, said_by=said_by)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_READ) as content,
        ):
            self._refuse_other_content(path, hashlib.sha256(content).hexdigest(), said_by)
            yield content

    def _refuse_other_content(self, path: Path, digest: str, said_by: str) -> None:
        if digest != self.sha256:
            raise ManifestError(
                f"{path} has sha256 {digest}, {said_by} says {self.sha256}",
                hint="the file was changed or damaged: copy or make it again",
            )

    @classmethod
    def of(cls, content: bytes) -> FileRecord:
        """Of a file with this content."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ManifestError: The file is missing, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{path} is missing", hint="is this a model directory?", reason="missing"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path}: not readable as JSON: {error}", reason="unreadable"
        ) from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def file_record(path: Path) -> FileRecord:
    """Hash and measure a file."""
    return FileRecord(sha256_of(path), path.stat().st_size)


def array_from_file(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file; nothing in it is unpickled.

    Raises:
        InputError: There is no such file, or it is no .npy file.
    """
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", reason="missing") from None
    except (
        Exception
    ) as error:  # NumPy's header parser raises whatever Python's tokenizer and zipfile do
        raise InputError(f"{path}: not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected one array in a .npy file, got an archive")
    return array
