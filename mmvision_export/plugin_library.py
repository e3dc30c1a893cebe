"""The plugin library as a file that engines depend on: its record, and loading it into TensorRT.

Like an engine it is executable content. An engine's sidecar names the library by its hash, and no other is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

from mmvision_export.domain import DOMAIN, OP_VERSION
from mmvision_export.errors import BackendError, ManifestError
from mmvision_export.manifest import FileRecord, read_json

__all__ = ["LIBRARY", "PluginLibraryRecord", "default_library", "library_record_path", "load_plugin_library"]

LIBRARY = "libmmvision_plugins.so"

_FORMAT = 1

# By hash: TensorRT keeps a library's creators until the process ends, and refuses a second one of the same names.
_loaded: dict[str, Path] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginLibraryRecord:
    """What is in a library: the `.json` beside it.

    Attributes:
        library: Hash and size of the file.
        machine: CPU it runs on, as `aarch64`.
        sms: Compute capabilities without their dot that it has binaries for; later GPUs compile its PTX.
        head_dims: Head sizes it has attention kernels for.
        dtypes: fp16 and bf16.
        versions: What it was made with.
    """

    library: FileRecord
    machine: str
    sms: list[int]
    head_dims: list[int]
    dtypes: list[str]
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the record to a path that is not yet public (see `output.new_files`)."""
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, library: Path) -> PluginLibraryRecord:
        """Read the record of a library, and check that the library is the file it was written for.

        Raises:
            ManifestError: One of them is missing, damaged, or of another machine.
        """
        path = library_record_path(library)
        build = "build one with: mmvision build-plugins"
        for file in (library, path):
            if not file.is_file():
                raise ManifestError(f"{file}: no such plugin library", hint=build)
        content = read_json(path)
        if content.pop("format", None) != _FORMAT:
            raise ManifestError(f"{path}: not a plugin library's record of format {_FORMAT}", hint=build)
        try:
            record = cls(library=FileRecord(**content.pop("library")), **content)
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{path}: malformed: {error}", hint=build) from error
        record.library.verify(library, said_by="its record")
        if record.machine != platform.machine():
            raise ManifestError(f"{library} is for {record.machine}, this machine is {platform.machine()}", hint=build)
        return record


def default_library(machine: str | None = None) -> Path:
    """Where `mmvision build-plugins` puts the library for a CPU, this machine's if None."""
    return Path("engines") / "plugins" / (machine or platform.machine()) / LIBRARY


def library_record_path(library: Path) -> Path:
    """The record's path: the library's with `.json` for its last suffix."""
    return library.with_suffix(".json")


def load_plugin_library(trt: Any, library: Path, sha256: str) -> None:
    """Load a library into TensorRT's registry, once in a process.

    Args:
        trt: TensorRT's Python module.
        library: The file; the caller has verified it.
        sha256: Its hash.

    Raises:
        BackendError: TensorRT refuses it, or has other plugins of these names already.
    """
    if sha256 in _loaded:
        return
    registry = trt.get_plugin_registry()
    if any(creator.plugin_namespace == DOMAIN for creator in registry.all_creators):
        known = ", ".join(map(str, _loaded.values())) or "one that this process loaded by itself"
        raise BackendError(
            f"{library} cannot be loaded: this process has another library of {DOMAIN} plugins, {known}",
            hint="use engines of one plugin library in a process",
        )
    if registry.load_library(str(library.resolve())) is None or not any(
        creator.plugin_namespace == DOMAIN and creator.plugin_version == str(OP_VERSION)
        for creator in registry.all_creators
    ):
        raise BackendError(f"TensorRT could not load the plugin library {library}")
    _loaded[sha256] = library
