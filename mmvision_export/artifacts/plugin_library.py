"""The plugin library as a file that engines depend on.

An engine's sidecar names the library by its hash, and no other is loaded.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import ClassVar

from mmvision_export.artifacts.library_record import LibraryRecord, default_folder
from mmvision_export.core.compute_capability import ComputeCapability

__all__ = ["LIBRARY", "PluginLibraryRecord", "default_library"]

LIBRARY = "libmmvision_plugins.so"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginLibraryRecord(LibraryRecord):
    """What is in a plugin library.

    Attributes:
        sms: GPUs it has binaries for, as 87; later ones compile its PTX.
        head_dims: Head sizes it has attention kernels for.
        dtypes: fp16 and bf16.
    """

    KIND: ClassVar[str] = "plugin library"
    BUILD: ClassVar[str] = "mmvision build-plugins"

    sms: list[int]
    head_dims: list[int]
    dtypes: list[str]

    @property
    def compute_capabilities(self) -> list[ComputeCapability]:
        """GPUs it has binaries for, ascending."""
        return sorted(map(ComputeCapability.from_sm, self.sms))


def default_library(machine: str | None = None) -> Path:
    """Where `mmvision build-plugins` puts the library for a CPU, this machine's if None."""
    return default_folder(machine or platform.machine()) / LIBRARY
