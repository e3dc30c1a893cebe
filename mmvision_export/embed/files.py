"""Image files as rows: those below a folder of this machine, or below a URI."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmvision_export.core.errors import InputError
from mmvision_export.embed.arrow import file_system, required_pyarrow
from mmvision_export.embed.listing import Listing, Row, utf8
from mmvision_export.models.minimax_m3_vl.images import EncodedImage
from mmvision_export.runtime.folder_files import files_below

__all__ = ["MAX_ENCODED_BYTES", "FilePart", "RemotePart", "files_of_folder", "files_of_uri"]

MAX_ENCODED_BYTES = 1 << 28
"""Most bytes of a file that is read into memory before it is decoded."""


@dataclasses.dataclass(frozen=True)
class FilePart:
    """Files of a folder of this machine.

    Attributes:
        index: See `Part`.
        folder: The folder.
        names: Paths below it.
    """

    index: int
    folder: Path
    names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """See `Part`."""
        return len(self.names)

    def rows(self) -> Iterator[Row]:
        """See `Part.rows`."""
        for name in self.names:
            yield Row(utf8(name), self.folder / name)


@dataclasses.dataclass(frozen=True)
class RemotePart:
    """Files below a URI.

    Attributes:
        index: See `Part`.
        uri: Its file system is the one that the files are in.
        folder: Path of the folder in that file system.
        names: Paths below it.
    """

    index: int
    uri: str
    folder: str
    names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """See `Part`."""
        return len(self.names)

    def rows(self) -> Iterator[Row]:
        """See `Part.rows`. A file that cannot be read is a row with an error."""
        system, _ = file_system(self.uri)
        for name in self.names:
            try:
                with system.open_input_file(f"{self.folder}/{name}") as file:
                    if file.size() > MAX_ENCODED_BYTES:
                        error = f"has {file.size()} bytes, the limit is {MAX_ENCODED_BYTES}"
                        yield Row(name, None, f"{name}: {error}")
                        continue
                    content = file.read()
            except OSError as error:
                yield Row(name, None, f"{name}: cannot be read: {error}")
                continue
            yield Row(name, EncodedImage(name, content))


def files_of_folder(folder: Path, *, rows_per_part: int) -> Listing:
    """Every file of a folder and of all folders below, hidden ones excepted.

    Raises:
        InputError: A folder cannot be listed, or there are no files.
    """
    listed = files_below([folder])
    if listed.unreadable:
        path, reason = listed.unreadable[0]
        raise InputError(f"{path}: cannot be listed: {reason}", reason="unreadable")
    if not listed.files:
        raise InputError(f"no files in {folder}", reason="missing")
    digest = hashlib.sha256()
    for file in listed.files:
        try:
            status = file.source.stat()
            facts = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # a link to nowhere: a failure of its row
            facts = "-"
        digest.update(os.fsencode(file.name) + f"\0{facts}\0".encode())
    names = [str(file.name) for file in listed.files]
    parts = [
        FilePart(index, folder.absolute(), tuple(names[first : first + rows_per_part]))
        for index, first in enumerate(range(0, len(names), rows_per_part))
    ]
    notes = tuple(f"{link}: a link to a folder is not followed" for link in listed.linked)
    return Listing(str(folder), parts, digest.hexdigest(), notes)


def files_of_uri(uri: str, *, rows_per_part: int) -> Listing:
    """Every file below a URI, by name; those whose path has a hidden part excepted.

    Raises:
        InputError: It cannot be listed, or there are no files.
    """
    arrow = required_pyarrow()
    system, folder = file_system(uri)
    folder = folder.rstrip("/")
    try:
        found = system.get_file_info(arrow.fs.FileSelector(folder, recursive=True))
    except OSError as error:
        raise InputError(f"{uri}: cannot be listed: {error}", reason="unreadable") from error
    files = {
        info.path.removeprefix(folder).lstrip("/"): info
        for info in found
        if info.type == arrow.fs.FileType.File
    }
    files = {
        name: info
        for name, info in files.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    if not files:
        raise InputError(f"no files in {uri}", reason="missing")
    digest = hashlib.sha256()
    names = sorted(files)
    for name in names:
        info = files[name]
        digest.update(f"{name}\0{info.size} {info.mtime_ns}\0".encode())
    parts = [
        RemotePart(index, uri, folder, tuple(names[first : first + rows_per_part]))
        for index, first in enumerate(range(0, len(names), rows_per_part))
    ]
    return Listing(uri, parts, digest.hexdigest())
