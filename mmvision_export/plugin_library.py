"""The plugin library as a file that engines depend on: its record, and loading it into TensorRT.

An engine's sidecar names the library by its hash, and no other is loaded.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any, ClassVar

from mmvision_export.domain import DOMAIN, OP_VERSION
from mmvision_export.errors import BackendError
from mmvision_export.library_record import LibraryRecord, default_folder

__all__ = ["LIBRARY", "PluginLibraryRecord", "default_library", "load_plugin_library"]

LIBRARY = "libmmvision_plugins.so"

# By hash: TensorRT keeps a library's creators until the process ends, and refuses a second one of the same names.
_loaded: dict[str, Path] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginLibraryRecord(LibraryRecord):
    """What is in a plugin library.

    Attributes:
        sms: Compute capabilities without their dot that it has binaries for; later GPUs compile its PTX.
        head_dims: Head sizes it has attention kernels for.
        dtypes: fp16 and bf16.
    """

    KIND: ClassVar[str] = "plugin library"
    BUILD: ClassVar[str] = "mmvision build-plugins"

    sms: list[int]
    head_dims: list[int]
    dtypes: list[str]


def default_library(machine: str | None = None) -> Path:
    """Where `mmvision build-plugins` puts the library for a CPU, this machine's if None."""
    return default_folder(machine or platform.machine()) / LIBRARY


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
