"""Small encoders, and ways to fill them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from hypothesis import strategies as st

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

HEAD_DIM_80 = EncoderConfig(
    hidden_size=160,
    num_attention_heads=2,
    num_hidden_layers=2,
    intermediate_size=320,
    text_hidden_size=96,
    projector_hidden_size=112,
)
"""The released head_dim: 78 of 80 channels rotate."""

HEAD_DIM_64 = dataclasses.replace(HEAD_DIM_80, hidden_size=128)
"""60 of 64 channels rotate."""

HEAD_DIM_48 = dataclasses.replace(HEAD_DIM_80, hidden_size=96)
"""All 48 channels rotate, none pass through."""

GRIDS: dict[str, list[tuple[int, int, int]]] = {
    "single": [(1, 6, 8)],
    "two of different size": [(1, 4, 6), (1, 8, 2)],
    "three": [(1, 2, 2), (1, 6, 4), (1, 2, 10)],
    "video row": [(4, 4, 6)],
    "many": [(1, 2, 2), (2, 4, 2), (1, 2, 6)] * 9,
}


def batch(
    grid: list[tuple[int, int, int]], config: EncoderConfig, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Normal random patches for a grid."""
    rows = np.array(grid, dtype=np.int64)
    patches = np.random.default_rng(seed).standard_normal(
        (int(rows.prod(axis=1).sum()), config.patch_dim)
    )
    return patches.astype(np.float32), rows


def grids(merge: int = 2, max_images: int = 6) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Lists of valid grid rows, small enough to loop over."""
    blocks = st.integers(1, 5)
    row = st.tuples(st.integers(1, 4), blocks, blocks).map(
        lambda r: (r[0], r[1] * merge, r[2] * merge)
    )
    return st.lists(row, min_size=1, max_size=max_images)


def relative_l2(result: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """L2 norm of the difference over that of the reference, in float64."""
    a, b = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def copy_of(directory: Path, target: Path) -> Path:
    """A copy of a model directory that a test may change."""
    shutil.copytree(directory, target)
    return target


def arrays(state: dict[str, Any]) -> dict[str, npt.NDArray[np.floating]]:
    """A state dict as NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def run_graph(path: Path, pixels: np.ndarray, grid: np.ndarray, level: Any = None) -> np.ndarray:
    """Run an ONNX file in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"pixel_values": pixels, "grid_thw": grid})
    result: np.ndarray = out
    return result
