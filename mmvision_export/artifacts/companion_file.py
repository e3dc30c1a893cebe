"""A file that lies beside an engine and belongs to it, as its sidecar says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmvision_export.artifacts.manifest import refuse_path
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord

__all__ = ["CompanionFile"]


@dataclasses.dataclass(frozen=True)
class CompanionFile:
    """Name and identity of the file.

    Attributes:
        name: File name, without a path.
        record: Hash and size.

    Raises:
        ManifestError: The name is a path.
    """

    name: str
    record: FileRecord

    def __post_init__(self) -> None:
        refuse_path(self.name)

    def content(self, engine: Path) -> bytes:
        """The file beside an engine, verified.

        Raises:
            ManifestError: It is missing, a link, or not the one that was written with the engine.
        """
        path = engine.parent / self.name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ManifestError(f"{path}: not a regular file", reason="unsafe")
        said_by = f"the sidecar of {engine.name}"
        self.record.verify_size(path, said_by=said_by)
        with self.record.verified_map(path, said_by=said_by) as content:
            return bytes(content)
