"""Photographs, and transformers' own preprocessing of them."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def from_transformers(name: str) -> Callable[..., Any]:
    """A function of the transformers processor's source: the module itself imports torchvision."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    path = (
        Path(spec.submodule_search_locations[0])
        / "models/minimax_m3_vl/image_processing_minimax_m3_vl.py"
    )
    tree = ast.parse(path.read_text())
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def photographs() -> dict[str, np.ndarray]:
    from skimage import data

    return {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}
