"""Options of `mmvision build-engine` and `mmvision build` that choose among plans of one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.artifacts.build_options import (
    BuildOptions,
    HardwareLevel,
    bytes_from_size,
    size_text,
)
from mmvision_export.core.errors import EngineError

__all__ = [
    "Hardware",
    "OptimizationLevel",
    "Refit",
    "StripWeights",
    "TimingCacheFile",
    "VersionCompatible",
    "WeightStreaming",
    "Workspace",
    "arguments_from_options",
]


def _size(text: str) -> int:
    try:
        return bytes_from_size(text)
    except EngineError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}") from None


Workspace = Annotated[
    Optional[int],
    typer.Option(
        "--workspace",
        metavar="SIZE",
        parser=_size,
        help="Most device memory that a layer may use for itself, as 512M or 4G. Default: TensorRT's.",
    ),
]
OptimizationLevel = Annotated[
    Optional[int],
    typer.Option(
        "--optimization-level",
        metavar="0-5",
        min=0,
        max=5,
        help="How long TensorRT searches for fast kernels. Default: TensorRT's, 3.",
    ),
]
TimingCacheFile = Annotated[
    Optional[Path],
    typer.Option(
        "--timing-cache",
        metavar="FILE",
        help="Kernel timings to read and to add to; a missing file is made. Default: in your cache "
        "folder, one for each GPU and release of TensorRT.",
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="Later releases of the same major version of TensorRT load the engine too.",
    ),
]
Hardware = Annotated[
    Optional[HardwareLevel],
    typer.Option(
        "--hardware-compatible",
        help="GPUs that run a TensorRT engine beside the one that builds it: Ampere and later, or all "
        "of the same compute capability.",
    ),
]
StripWeights = Annotated[
    bool,
    typer.Option(
        "--strip-weights",
        help="Leave the weights out. Opening the engine takes them from the model directory.",
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="Let the engine take the weights of other checkpoints with the same graph.",
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="Let weights stay in host memory: mmvision run --weight-budget says how many do not.",
    ),
]


def arguments_from_options(options: BuildOptions, timing_cache: Path | None) -> list[str]:
    """The words of a command line that give these options."""
    workspace = options.workspace_bytes
    valued = {
        "--workspace": None if workspace is None else size_text(workspace),
        "--optimization-level": options.optimization_level,
        "--hardware-compatible": options.hardware,
        "--timing-cache": timing_cache,
    }
    flags = {
        "--version-compatible": options.version_compatible,
        "--strip-weights": options.strip_weights,
        "--refit": options.refit,
        "--weight-streaming": options.weight_streaming,
    }
    words = [
        part for name, value in valued.items() if value is not None for part in (name, str(value))
    ]
    return words + [name for name, is_given in flags.items() if is_given]
