"""Photographs, and transformers' own preprocessing of them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


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


@functools.cache
def natural(width: int, height: int) -> Image.Image:
    """A picture with the spectrum of photographs, 1/f, and the edges of things before one another."""
    generator = np.random.default_rng(width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * generator.random(frequency.shape))
        field = np.fft.irfft2(phases / frequency, s=(height, width))
        channels.append(128 + 40 * field / field.std())
    levels = np.stack(channels, axis=-1)
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(12):
        cx, cy, radius = generator.random(3) * (width, height, height / 5)
        levels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] += generator.normal(0, 50, 3)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
