"""What several commands' options share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mmvision_export.artifacts.manifest import find_model_directory
from mmvision_export.cli.console import messages
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, InputError

__all__ = [
    "AsJson",
    "ModelOption",
    "Quiet",
    "Verbose",
    "compute_capability",
    "one_precision",
    "print_json",
    "the_model",
]

ModelOption = Annotated[
    Optional[Path],
    typer.Option(
        "--model", metavar="DIR", help="Model directory. Default: the only one in engines/."
    ),
]


def _be_quiet(value: bool) -> None:
    messages.quiet = value


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", callback=_be_quiet, help="Print results and errors only: no progress, no notes."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of words (docs/cli.md).")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


def print_json(content: Mapping[str, Any]) -> None:
    """Print a command's result as one JSON object, paths as strings."""
    print(json.dumps(content, indent=2, default=str), flush=True)


def compute_capability(text: str) -> ComputeCapability:
    """Parses the value of `--sm` and `--compute-capability`.

    Raises:
        typer.BadParameter: See `ComputeCapability.parse`.
    """
    try:
        return ComputeCapability.parse(text)
    except EngineError as error:
        raise typer.BadParameter(f"{error.message}; {error.hint}") from None


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
    refuse_undecodable(model)
    if given is None:
        messages.print(f"model: {model}", markup=False)
    return model


def refuse_undecodable(path: Path) -> None:
    """Refuse a path that is no UTF-8: ONNX Runtime and onnx open none.

    Raises:
        InputError: Says so.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path}: the name is not UTF-8; ONNX Runtime cannot open such a file",
            hint="rename the file or folder",
        ) from None
