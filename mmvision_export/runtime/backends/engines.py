"""Which engine of a model directory is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mmvision_export.artifacts.manifest import PLANS, Manifest, model_directory_of
from mmvision_export.core.errors import ManifestError

__all__ = ["open_fitting"]

_Opened = TypeVar("_Opened")


def open_fitting(path: Path, opened: Callable[[Path, Manifest | None], _Opened]) -> _Opened:
    """Open an engine file, or the newest one of a model directory that fits this machine.

    An engine of a directory that this user has not built is passed over (see `core.trust`).

    Args:
        path: The file or the directory.
        opened: Opens an engine, given the manifest of the model directory that it lies in, if it
            does.

    Raises:
        ManifestError: There is no engine, or none that fits; the message says why for each.
    """
    if path.is_file():
        directory = model_directory_of(path)
        return opened(path, None if directory is None else Manifest.read(directory))
    manifest = Manifest.read(path)
    engines = sorted((path / PLANS).glob("*.engine"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not engines:
        raise ManifestError(
            f"{path / PLANS} holds no engine", hint="build one with: mmvision build-engine"
        )
    reasons: list[str] = []
    for engine in engines:
        try:
            return opened(engine, manifest)
        except ManifestError as error:
            reasons.append(error.message)
    raise ManifestError(
        "no engine fits this machine: " + "; ".join(reasons), hint="mmvision build-engine"
    )
