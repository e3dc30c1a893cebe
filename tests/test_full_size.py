"""The released size and the released depth: what small encoders cannot show."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvision_export.core.metrics import metrics
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.weights import WeightSource
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, relative_l2, run_graph

pytestmark = pytest.mark.slow


def run_measured(*arguments: str) -> tuple[str, float]:
    """Standard output and the peak memory, in bytes, of a command of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "mmvision_export.cli.entry", *arguments], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        out = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, out
    return out, usage.ru_maxrss * 1024.0


def test_full_size_export_and_engine(tmp_path: Path) -> None:
    """865 M parameters on two cores: exported in float16, then built for compute capability 8.9."""
    directory = tmp_path / "full"
    _, peak = run_measured(
        "export",
        "--onnx",
        "--preset",
        "full",
        "--random-weights",
        "--fp16",
        # The comparison with PyTorch holds the encoder and the graph at once: 8.1 GB.
        "--no-check",
        "--output",
        str(directory),
    )
    weights = (directory / "model.onnx.data").stat().st_size
    assert weights > 1.73e9
    assert peak <= 2.5 * weights + 1e9
    print(f"export: peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights")

    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    out, peak = run_measured(
        "build-engine", "--fp16", "--model", str(directory), "--compute-capability", "8.9"
    )
    assert "fused" in out
    (engine,) = (directory / "plans").glob("*.engine")
    assert engine.stat().st_size > weights
    assert json.loads(engine.with_suffix(".json").read_text())["compute_capabilities"] == ["8.9"]
    print(f"engine: peak {peak / 1e9:.2f} GB")


def test_float16_through_the_full_depth(tmp_path: Path) -> None:
    """32 layers, narrow: float16 against float64, beside eager PyTorch in float16."""
    config = dataclasses.replace(
        HEAD_DIM_80, hidden_size=320, num_attention_heads=4, num_hidden_layers=32
    )
    export_model_directory(
        WeightSource(random_config=config, seed=1), tmp_path / "m", precision="fp16"
    )
    exact = encoder_from_state_dict(config, random_state_dict(config, seed=1, dtype=torch.float64))
    half = encoder_from_state_dict(config, random_state_dict(config, seed=1, dtype=torch.float16))
    for grid in GRIDS.values():
        pixels, rows = batch(grid, config)
        pixels = pixels.astype(np.float16)
        with torch.inference_mode():
            expected = exact(torch.from_numpy(pixels).double(), torch.from_numpy(rows)).numpy()
            eager = half(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
        out = run_graph(tmp_path / "m" / "model.onnx", pixels, rows)
        assert relative_l2(out, expected) <= 2 * relative_l2(eager, expected)
        assert metrics(out, expected).min_cosine >= 0.999
