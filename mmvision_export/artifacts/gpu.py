"""A GPU, as records name it."""

from __future__ import annotations

import dataclasses
import re

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError

__all__ = ["Gpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What kernels' timings depend on. GPUs of one compute capability differ in the rest.

    Attributes:
        name: The driver's for it, as `Orin`.
        compute_capability: Its generation.
        multiprocessors: How many it has; of a MIG slice, how many that has.
        memory_bytes: All of its memory.

    Raises:
        ManifestError: A number is not positive.
    """

    name: str
    compute_capability: ComputeCapability
    multiprocessors: int
    memory_bytes: int

    def __post_init__(self) -> None:
        for name in ("multiprocessors", "memory_bytes"):
            if getattr(self, name) < 1:
                raise ManifestError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def file_name(self) -> str:
        """All of it, in letters that every file system takes: `orin-sm87-16-65890271232`."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{name}-sm{self.compute_capability.sm}-{self.multiprocessors}-{self.memory_bytes}"

    def __str__(self) -> str:
        return (
            f"{self.name}, compute capability {self.compute_capability}, "
            f"{self.multiprocessors} multiprocessors, {self.memory_bytes / 1e9:.1f} GB"
        )
