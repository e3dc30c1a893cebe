"""Graphs of a model directory as they are read by commands that make something of them."""

from __future__ import annotations

import shlex
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.core.errors import ManifestError

__all__ = ["load_graph"]


def load_graph(path: Path) -> ir.Model:
    """Load a graph; its weights are mapped when they are asked for.

    Raises:
        ManifestError: A weight file has several names (hard links), as `cp -al` makes them. onnx
            reads no such file, since a link may lead to a file of another user.
    """
    for location in sorted(external_locations(path.read_bytes())):
        weights = path.parent / location
        if weights.is_file() and weights.stat().st_nlink > 1:
            name, copy = shlex.quote(str(weights)), shlex.quote(f"{weights}.copy")
            raise ManifestError(
                f"{weights} has {weights.stat().st_nlink} names (hard links); onnx refuses to read such weights",
                hint=f"give the directory a copy of its own: cp {name} {copy} && mv {copy} {name}",
                reason="unsafe",
            )
    return ir.load(path)
