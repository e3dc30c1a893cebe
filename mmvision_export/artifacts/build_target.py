"""What an engine is built for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args

from mmvision_export.artifacts.build_options import DEFAULT_OPTIONS, BuildOptions
from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError

__all__ = [
    "TENSORRT_NAMES",
    "BuildTarget",
    "Installation",
    "TensorRTName",
    "TensorRTVersion",
]

TensorRTName = Literal["tensorrt", "tensorrt-rtx"]
TENSORRT_NAMES: tuple[TensorRTName, ...] = get_args(TensorRTName)


@dataclasses.dataclass(frozen=True)
class TensorRTVersion:
    """A version of TensorRT or TensorRT-RTX, as `10.14.1.48`.

    An engine loads in the very version that built it, unless it was built to be version-compatible. What
    a version can do depends on `release`.

    Raises:
        ManifestError: The text does not begin with two numbers.
    """

    text: str

    def __post_init__(self) -> None:
        if re.match(r"\d+\.\d+", self.text) is None:
            raise ManifestError(f"not a version of TensorRT: {self.text!r}")

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = re.findall(r"\d+", self.text)[:2]
        return int(major), int(minor)

    @classmethod
    def from_json(cls, value: Any) -> TensorRTVersion:
        """From the string that a record holds."""
        if not isinstance(value, str):
            raise ManifestError(f"a version of TensorRT must be a string, got {value!r}")
        return cls(value)

    def to_json(self) -> str:
        """The string that a record holds."""
        return self.text

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installation:
    """A TensorRT as it is installed on a machine.

    Attributes:
        backend: Which TensorRT.
        tensorrt_version: Its version.
        platform: Operating system and CPU, as `linux-x86_64`.
    """

    backend: TensorRTName
    tensorrt_version: TensorRTVersion
    platform: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildTarget(Installation):
    """What an engine is built with and for.

    Attributes:
        compute_capabilities: GPUs it shall run on, ascending.
        precision: Of the engine.
        opset: Of the graph it is built from.
        gpu: The one that the kernels are timed on. None for TensorRT-RTX, which times nothing when it
            builds.
        options: What else was chosen.
    """

    compute_capabilities: tuple[ComputeCapability, ...]
    precision: str
    opset: int
    gpu: Gpu | None = None
    options: BuildOptions = DEFAULT_OPTIONS

    @property
    def engine_name(self) -> str:
        """File name of the engine. Engines of different options lie beside each other."""
        gpus = "-".join(str(capability.sm) for capability in self.compute_capabilities)
        words = "-".join((self.precision, *self.options.words))
        return f"{self.backend}-{self.tensorrt_version}-sm{gpus}-{words}.engine"
