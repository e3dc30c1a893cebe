"""`BUNDLE.json`: every file of a bundle, and what it was made for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import ClassVar

from mmvision_export.artifacts.deployment import DeploymentName
from mmvision_export.artifacts.library_record import Machine
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.records import json_text, parsed_record
from mmvision_export.core.regular_file import opened_regular_file

__all__ = [
    "BUNDLE",
    "BUNDLE_MODEL",
    "BUNDLE_PLUGINS",
    "CHECKSUMS",
    "EXECUTABLES",
    "MOST_RECORD_BYTES",
    "SAMPLE_FILES",
    "WHEELS",
    "BundleRecord",
]

BUNDLE = "BUNDLE.json"
BUNDLE_MODEL = "model"
"""The folder of the model directory."""
BUNDLE_PLUGINS = "plugins"
"""The folder of the plugin library."""
CHECKSUMS = "SHA256SUMS"
"""Hashes as `sha256sum` reads them: install.sh compares before any Python of the bundle runs."""
WHEELS = "wheels"
"""The folder of the packages."""
EXECUTABLES = ("install.sh", "verify.sh")
SAMPLE_FILES = ("sample/pixel_values.npy", "sample/grid_thw.npy", "sample/image_embeds.npy")
"""Patches, their grid, and their embeddings."""

MOST_RECORD_BYTES = 16 << 20
_MOST_FILE_BYTES = 1 << 50

_HINT = "copy the whole bundle again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleRecord:
    """Content of `BUNDLE.json`.

    Attributes:
        target: What it is for.
        machine: CPU that its libraries and engines run on; None where it has none, and any CPU will do.
        model: Name of the model directory it was made from.
        version: Of mmvision-export.
        precision: Of the engine that is built on the target, or of the graph for a CPU.
        build: Arguments of `mmvision build-engine` on the target, without the model; empty for a CPU.
        sample_graph: The graph that computed the stored embeddings.
        files: Every other file of the bundle, by path, in the order of the archive.
    """

    FORMAT: ClassVar[int] = 1

    target: DeploymentName
    machine: Machine | None
    model: str
    version: str
    precision: str
    build: list[str]
    sample_graph: str
    files: dict[str, FileRecord]

    def __post_init__(self) -> None:
        for path in self.files:
            parts = PurePosixPath(path).parts
            # Anything that leads elsewhere, and what another spelling would be the same file as.
            if (
                not parts
                or "/".join(parts) != path
                or ".." in parts
                or path.startswith("/")
                or "\\" in path
                or "\0" in path
                or path == BUNDLE
            ):
                raise ManifestError(f"a bundle has no file of the name {path!r}", reason="unsafe")
            if not 0 <= self.files[path].size_bytes <= _MOST_FILE_BYTES:
                raise ManifestError(
                    f"{path}: a file of a bundle has 0 to {_MOST_FILE_BYTES} bytes, got "
                    f"{self.files[path].size_bytes}"
                )

    @property
    def text(self) -> bytes:
        """The file, byte by byte."""
        return json_text(self, form=self.FORMAT).encode()

    @property
    def size_bytes(self) -> int:
        """Of all files but this one."""
        return sum(record.size_bytes for record in self.files.values())

    @classmethod
    def read(cls, folder: Path) -> BundleRecord:
        """Read the record of an unpacked bundle.

        Raises:
            ManifestError: It is missing, changed or damaged.
        """
        path = folder / BUNDLE
        try:
            with opened_regular_file(path) as file:
                content = file.read(MOST_RECORD_BYTES + 1)
        except InputError as error:
            raise ManifestError(str(error), hint=_HINT, reason=error.reason) from error
        return cls.parsed(content, path)

    @classmethod
    def parsed(cls, content: bytes, path: Path) -> BundleRecord:
        """A record from the bytes of its file.

        Args:
            content: Of the file.
            path: What an error calls it.

        Raises:
            ManifestError: It is not as `mmvision bundle` wrote it, to the byte.
        """
        try:
            value = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{path}: not readable as JSON: {error}", hint=_HINT, reason="unreadable"
            ) from error
        record = parsed_record(cls, value, path, what="a bundle", formats=(cls.FORMAT,), hint=_HINT)
        if content != record.text:
            raise ManifestError(
                f"{path} was changed: it is not as mmvision bundle wrote it",
                hint=_HINT,
                reason="malformed",
            )
        return record
