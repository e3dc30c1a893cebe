"""Files: identified by size and hash, read as JSON or arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.core.regular_file import opened_regular_file

__all__ = [
    "FileRecord",
    "array_from_file",
    "file_record",
    "json_from_file",
    "read_json",
    "sha256_of",
]


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


def json_from_file(path: Path) -> Any:
    """The JSON value of a regular file.

    Raises:
        InputError: The file is missing, cannot be opened, is a folder, FIFO or device, or is no JSON.
    """
    with opened_regular_file(path) as file:
        try:
            return json.loads(file.read().decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not readable as JSON: {error}", reason="unreadable"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ManifestError: The file is missing, or not a JSON object.
    """
    try:
        content = json_from_file(path)
    except InputError as error:
        if error.reason == "missing":
            raise ManifestError(
                f"{path} is missing", hint="is this a model directory?", reason="missing"
            ) from None
        raise ManifestError(str(error), reason=error.reason) from error
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
    with opened_regular_file(path) as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (
            Exception
        ) as error:  # NumPy's header parser raises whatever Python's tokenizer and zipfile do
            raise InputError(f"{path}: not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected one array in a .npy file, got an archive")
    return array
