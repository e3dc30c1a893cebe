"""The record beside a compiled library: what it was made with, and the hash of the file that it speaks of.

A library is executable content: none is loaded that is not the file of its record.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import ClassVar, TypeVar

from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord, read_json

__all__ = ["LIBRARIES", "LibraryRecord", "default_folder", "library_record_path"]

LIBRARIES = "plugins"
"""The folder of libraries, with one for each CPU: in `engines/`, beside the model directories, or in one of them."""

_FORMAT = 1
_Record = TypeVar("_Record", bound="LibraryRecord")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibraryRecord:
    """What is in a library: the `.json` beside it.

    Attributes:
        library: Hash and size of the file.
        machine: CPU it runs on, as `aarch64`.
        versions: What it was made with.
    """

    KIND: ClassVar[str] = "AMX kernel library"
    BUILD: ClassVar[str] = "mmvision build-plugins --cpu"

    library: FileRecord
    machine: str
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the record to a path that is not yet public (see `output.new_files`)."""
        path.write_text(
            json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def read(cls: type[_Record], library: Path) -> _Record:
        """Read the record of a library, and check that the library is the file it was written for.

        Raises:
            ManifestError: One of them is missing, damaged, or of another machine.
        """
        path = library_record_path(library)
        build = f"build one with: {cls.BUILD}"
        for file in (library, path):
            if not file.is_file():
                raise ManifestError(f"{file}: no such {cls.KIND}", hint=build)
        content = read_json(path)
        if content.pop("format", None) != _FORMAT:
            raise ManifestError(
                f"{path}: not a {cls.KIND}'s record of format {_FORMAT}", hint=build
            )
        try:
            record = cls(library=FileRecord(**content.pop("library")), **content)
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{path}: malformed: {error}", hint=build) from error
        record.library.verify(library, said_by="its record")
        if record.machine != platform.machine():
            raise ManifestError(
                f"{library} is for {record.machine}, this machine is {platform.machine()}",
                hint=build,
            )
        return record


def default_folder(machine: str) -> Path:
    """Where `mmvision build-plugins` puts the libraries for a CPU."""
    return Path("engines") / LIBRARIES / machine


def library_record_path(library: Path) -> Path:
    """The record's path: the library's with `.json` for its last suffix."""
    return library.with_suffix(".json")
