"""What a deployer chooses of an engine beside its sizes: what makes another plan of the same graph.

The words are TensorRT's own. A timing cache and the device that times the kernels are no part of
it: they say how a plan is found, and not which plan was asked for.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, get_args

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError

__all__ = [
    "AMPERE",
    "DEFAULT_OPTIONS",
    "HARDWARE_LEVELS",
    "BuildOptions",
    "HardwareLevel",
    "bytes_from_size",
    "size_text",
]

HardwareLevel = Literal["ampere-plus", "same-compute-capability"]
"""GPUs that a plan runs on beside the one that it was built on: Ampere and later, or any of the same
compute capability."""

HARDWARE_LEVELS: tuple[HardwareLevel, ...] = get_args(HardwareLevel)

AMPERE = ComputeCapability(8, 0)
"""The first GPU of the level `ampere-plus`."""

_LEVELS = range(6)
_UNITS = {"K": 10, "M": 20, "G": 30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build. Without any, a plan is what TensorRT makes by default.

    Attributes:
        workspace_bytes: Most device memory that one layer may use for itself; TensorRT's default, all
            of the device's, if None.
        optimization_level: How long TensorRT searches for fast kernels, 0 to 5; its default, 3, if
            None.
        version_compatible: Whether later releases of the same major version load the plan. It then
            has a runtime of its own inside, which is code.
        hardware: On which other GPUs the plan runs; on none if None.
        strip_weights: Whether the plan has no weights: they are put in when the engine is opened, from
            the model directory.
        refit: Whether the weights of another checkpoint may be put in. Without it a stripped plan takes
            the weights that it was built with, and no others.
        weight_streaming: Whether weights may stay in the host's memory and follow layer by layer.

    Raises:
        EngineError: A number is out of range.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware: HardwareLevel | None = None
    strip_weights: bool = False
    refit: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise EngineError(
                f"workspace_bytes must be at least 1, got {self.workspace_bytes}",
                hint="leave it out for TensorRT's default",
            )
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise EngineError(
                f"optimization_level must be {_LEVELS[0]} to {_LEVELS[-1]}, "
                f"got {self.optimization_level}"
            )
        if self.hardware is not None and self.hardware not in HARDWARE_LEVELS:
            raise EngineError(
                f"hardware must be one of {', '.join(HARDWARE_LEVELS)}, got {self.hardware!r}"
            )

    @property
    def takes_weights(self) -> bool:
        """Whether weights can be put into the plan after it was built."""
        return self.strip_weights or self.refit

    @property
    def words(self) -> tuple[str, ...]:
        """What differs from the default, in words for a file's name: `workspace512m`, `refit`."""
        workspace = self.workspace_bytes
        level = self.optimization_level
        named = {
            "workspace" + ("" if workspace is None else size_text(workspace).lower()): workspace,
            f"level{level}": level is not None,
            "version-compatible": self.version_compatible,
            str(self.hardware).replace("-compute-capability", "-sm"): self.hardware,
            "stripped": self.strip_weights,
            "refit": self.refit,
            "streaming": self.weight_streaming,
        }
        return tuple(word for word, is_given in named.items() if is_given)

    def __str__(self) -> str:
        return ", ".join(self.words) or "none"


DEFAULT_OPTIONS = BuildOptions()
"""What TensorRT does by itself."""


def bytes_from_size(text: str) -> int:
    """Bytes of a size as `512M` or `4G`, in powers of 1024.

    A number without a unit is refused: tools that took one meant bytes, megabytes or gigabytes.

    Raises:
        EngineError: It is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(?:iB)?\s*", text, re.IGNORECASE)
    if found is None or not (size := int(float(found[1]) * (1 << _UNITS[found[2].upper()]))):
        raise EngineError(
            f"a size must be a number with its unit, K, M or G, got {text!r}",
            hint="as 512M or 4G, in powers of 1024",
        )
    return size


def size_text(size_bytes: int) -> str:
    """A size as `bytes_from_size` reads it, exact: `512M`, or bytes where it is no whole unit."""
    for unit, bits in reversed(_UNITS.items()):
        if size_bytes and size_bytes % (1 << bits) == 0:
            return f"{size_bytes >> bits}{unit}"
    return f"{size_bytes}B"
