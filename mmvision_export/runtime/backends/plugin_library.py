"""Loading a plugin library into TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmvision_export.core.errors import BackendError
from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = ["load_plugin_library"]

# By hash: TensorRT keeps a library's creators until the process ends, and refuses a second one of
# the same names.
_loaded: dict[str, Path] = {}


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
