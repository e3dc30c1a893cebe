"""Compute capabilities: GPU generations, as NVIDIA numbers them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mmvision_export.core.errors import EngineError, ManifestError

__all__ = ["ComputeCapability"]


@dataclasses.dataclass(frozen=True, order=True)
class ComputeCapability:
    """A GPU generation: `8.9` to people and in JSON, `89` to compilers and in file names."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """From `8.9`, `89`, `sm89` or `sm_89`; `120` is 12.0.

        Raises:
            EngineError: The text is none of these.
        """
        match = re.fullmatch(r"(?:sm_?)?(\d+?)\.?(\d)", text.strip().lower())
        if match is None:
            raise EngineError(f"not a compute capability: {text!r}", hint="give it as 8.9 or as 89")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_sm(cls, sm: int) -> ComputeCapability:
        """From a compiler's number: 89 is 8.9, 120 is 12.0."""
        return cls(*divmod(sm, 10))

    @classmethod
    def from_json(cls, value: Any) -> ComputeCapability:
        """From the string that a record holds.

        Raises:
            ManifestError: It is no string.
        """
        if not isinstance(value, str):
            raise ManifestError(f"a compute capability must be a string as 8.9, got {value!r}")
        return cls.parse(value)

    def to_json(self) -> str:
        """The string that a record holds."""
        return str(self)

    @property
    def sm(self) -> int:
        """The compiler's number: 89 for 8.9."""
        return 10 * self.major + self.minor

    @property
    def is_jetson(self) -> bool:
        """Whether it is that of a Jetson, which shares no kernels with a desktop's GPU of its generation."""
        return str(self) in ("7.2", "8.7", "10.1", "11.0")

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"
