"""Which build options a TensorRT has, and why it has no others, asked before any work.

TensorRT-RTX keeps the names of nearly all of TensorRT's options, and most of them do nothing there. An
option that does nothing is refused as one that is missing is: who gave it expects its effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.build_options import AMPERE, BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError

__all__ = ["BuildRequest", "refuse_options"]

_TURING = ComputeCapability(7, 5)
# https://docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html; the page
# of 11.4 has the warning no more.
_DROPS_BIASES = (11, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the refusals ask about.

    Attributes:
        target: What is built with and for, with its options.
        module: The TensorRT module.
        timing_cache: The file that was named, if one was.
        has_gpu: Whether this machine has a GPU to build on, which engines that take weights may need.
    """

    target: BuildTarget
    module: Any
    timing_cache: Path | None
    has_gpu: bool

    @property
    def options(self) -> BuildOptions:
        """Of the target."""
        return self.target.options

    @property
    def name(self) -> str:
        """The TensorRT, for people."""
        kind = "TensorRT-RTX" if self.target.backend == "tensorrt-rtx" else "TensorRT"
        return f"{kind} {self.target.tensorrt_version}"


def refuse_options(request: BuildRequest) -> None:
    """Refuse what this TensorRT has not, or cannot have here.

    Raises:
        EngineError: Names the option, the reason, and what to do instead.
    """
    refusals = _OF_RTX if request.target.backend == "tensorrt-rtx" else _OF_TENSORRT
    for refuse in refusals:
        refuse(request)


def _rtx_versions(request: BuildRequest) -> None:
    if request.options.version_compatible:
        # .../tensorrt-rtx/latest/inference-library/engine-compatibility.html. 1.7's builder looks for
        # libnvinfer_lean.so, which its package does not have.
        raise EngineError(
            f"no --version-compatible: engines of {request.name} load in that release only",
            hint="build an engine with each release; a build takes seconds and no GPU",
        )


def _rtx_hardware(request: BuildRequest) -> None:
    if request.options.hardware is not None:
        # What 1.7 logs when it is set: "setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX."
        raise EngineError(
            f"no --hardware-compatible: {request.name} supports no hardware compatibility level",
            hint="name each GPU: --compute-capability 8.6 8.9 12.0 makes one engine for all of them",
        )


def _rtx_level(request: BuildRequest) -> None:
    if request.options.optimization_level is not None:
        raise EngineError(
            f"no --optimization-level: {request.name} chooses kernels on the machine that runs the "
            "engine, and builds the same plan at every level",
            hint="VisionEncoder.open(..., kernels=) says when kernels are specialised to a shape",
        )


def _rtx_timings(request: BuildRequest) -> None:
    if request.timing_cache is not None:
        # .../tensorrt-rtx/latest/inference-library/timing-cache-migration.html
        raise EngineError(
            f"no --timing-cache: {request.name} times nothing when it builds, and a timing cache does "
            "not affect its engines",
            hint="leave --timing-cache out: the machine that runs the engine keeps what it compiles",
        )


def _rtx_weights(request: BuildRequest) -> None:
    """https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html."""
    if not request.options.takes_weights:
        return
    given = "--strip-weights" if request.options.strip_weights else "--refit"
    gpus = request.target.compute_capabilities
    if len(gpus) > 1:
        raise EngineError(
            f"no {given} for compute capability {', '.join(map(str, gpus))}: {request.name} builds "
            "engines that take weights for at most one",
            hint="build one for each, with --compute-capability",
        )
    if not request.has_gpu:
        raise EngineError(
            f"no {given} without a GPU: {request.name} needs one to build engines that take weights",
            hint="build on a machine with an RTX GPU, or leave the weights in",
        )


def _gpus_of_a_level(request: BuildRequest) -> None:
    level = request.options.hardware
    if level is None:
        return
    gpu = request.target.compute_capabilities[0]
    if gpu.is_jetson:
        # .../tensorrt/latest/inference-library/engine-compatibility.html
        raise EngineError(
            f"no --hardware-compatible for {gpu}: TensorRT has no hardware compatibility on a Jetson",
            hint="build on each kind of Jetson that the engine shall run on",
        )
    least = AMPERE if level == "ampere-plus" else _TURING
    if gpu < least:
        raise EngineError(
            f"no --hardware-compatible {level} for {gpu}: it is for GPUs from compute capability "
            f"{least} on"
        )
    known = getattr(request.module, "HardwareCompatibilityLevel", None)
    if not hasattr(known, level.upper().replace("-", "_")):
        raise EngineError(
            f"no --hardware-compatible {level}: {request.name} does not have it",
            hint="--hardware-compatible ampere-plus, or a later TensorRT",
        )


def _refit_that_drops_biases(request: BuildRequest) -> None:
    if request.options.refit and request.target.tensorrt_version.release == _DROPS_BIASES:
        raise EngineError(
            f"no --refit with {request.name}: its release notes say that such an engine may drop the "
            "bias of a matrix product",
            hint="build with another release; --strip-weights alone is not affected",
        )


_OF_RTX: tuple[Callable[[BuildRequest], None], ...] = (
    _rtx_versions,
    _rtx_hardware,
    _rtx_level,
    _rtx_timings,
    _rtx_weights,
)
_OF_TENSORRT: tuple[Callable[[BuildRequest], None], ...] = (
    _gpus_of_a_level,
    _refit_that_drops_biases,
)
