"""What several commands' options share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.artifacts.manifest import find_model_directory
from mmvision_export.cli.console import messages
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError

__all__ = ["ModelOption", "Verbose", "compute_capability", "one_precision", "the_model"]

ModelOption = Annotated[
    Optional[Path],
    typer.Option(
        "--model", metavar="DIR", help="Model directory. Default: the only one in engines/."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


def compute_capability(text: str) -> ComputeCapability:
    """Parses the value of `--sm` and `--compute-capability`.

    Raises:
        typer.BadParameter: See `ComputeCapability.parse`.
    """
    try:
        return ComputeCapability.parse(text)
    except EngineError as error:
        raise typer.BadParameter(f"{error}; {error.hint}") from None


def one_precision(**given: bool) -> str | None:
    """The precision whose flag was given, or None.

    Raises:
        typer.BadParameter: More than one was.
    """
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of --{', --'.join(chosen)}")
    return chosen[0] if chosen else None


def the_model(given: Path | None) -> Path:
    """The model directory given, or the only one there is, which is said.

    Raises:
        ManifestError: There is none, or more than one to choose from.
    """
    model = find_model_directory(given)
    if given is None:
        messages.print(f"model: {model}", markup=False)
    return model
