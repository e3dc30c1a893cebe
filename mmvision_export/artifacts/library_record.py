"""The record beside a compiled library: what it was made with, and its hash.

A library is executable content: none is loaded that is not the file of its record.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, get_args

from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.records import json_text, read_record

__all__ = [
    "LIBRARIES",
    "MACHINES",
    "LibraryRecord",
    "Machine",
    "default_folder",
    "library_record_path",
]

LIBRARIES = "plugins"
"""The folder of libraries, with one for each CPU: in `engines/` or in a model directory."""

Machine = Literal["x86_64", "aarch64"]
"""CPU of a library."""

MACHINES: tuple[Machine, ...] = get_args(Machine)

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
        path.write_text(json_text(self, form=_FORMAT), encoding="utf-8")

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
        record = read_record(
            cls, path, what=f"the record of a {cls.KIND}", formats=(_FORMAT,), hint=build
        )
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
