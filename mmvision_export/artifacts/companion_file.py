"""Files that lie beside an engine and belong to it, as its sidecar says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmvision_export.artifacts.manifest import refuse_path
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord

__all__ = ["CompanionFile", "PluginFile"]


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


@dataclasses.dataclass(frozen=True)
class PluginFile(CompanionFile):
    """The plugin library an engine needs.

    Part of the hash is in its name, so that engines of several libraries share a folder.
    """

    @classmethod
    def of(cls, record: FileRecord) -> PluginFile:
        """The name a library has beside engines."""
        return cls(f"libmmvision_plugins-{record.sha256[:12]}.so", record)

    def verify(self, engine: Path) -> Path:
        """Check the library beside an engine, and give its path.

        Raises:
            ManifestError: It is missing, or not the one the engine was built with.
        """
        path = engine.parent / self.name
        if not path.is_file():
            raise ManifestError(
                f"{engine} needs the plugin library {path}, which is missing "
                f"(sha256 {self.record.sha256})",
                hint="copy it from where the engine was built, or build the engine again here",
            )
        self.record.verify(path, said_by=f"the sidecar of {engine.name}")
        return path
