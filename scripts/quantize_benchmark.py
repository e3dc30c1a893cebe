"""Time `mmvision quantize` of this checkout beside that of another one, on the same model.

    git worktree add ../before REVISION
    python scripts/quantize_benchmark.py --layers 32 --before ../before

Both run in turns, each in a process of its own with the same packages, weights, images and gate. It prints
seconds, seconds of CPU and peak memory of both, and how many units each kept: of two that pass the same gate, the
one that keeps fewer is better. Random weights with outliers, as a trained tower has them, make some units costly.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.config import PRESETS
from mmvision_export.models.weights import WeightSource

_HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--before", type=Path, help="another checkout")
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--flavour", choices=("int8", "fp8", "cpu-int8"), default="int8")
    arguments.add_argument("--min-cosine", default="0.999")
    arguments.add_argument(
        "--before-min-cosine", help="of the other checkout, whose margin may be another"
    )
    arguments.add_argument("--rounds", type=int, default=1)
    given = arguments.parse_args()
    sides = {"this checkout": _HERE}
    if given.before is not None:
        sides[str(given.before)] = given.before.resolve()
    with tempfile.TemporaryDirectory(prefix="mmvision-quantize-") as temporary:
        model = Path(temporary) / "model"
        config = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=given.layers)
        export_model_directory(
            WeightSource(random_config=config, random_kind="outliers", seed=0), model
        )
        megabytes = Manifest.read(model).files["model.onnx.data"].size_bytes / 1e6
        print(
            f"{given.layers} layers, {megabytes:.0f} MB of float32 weights, gate {given.min_cosine}"
        )
        print(f"{'':32}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}{'kept':>8}{'of':>6}  cosine")
        for number in range(given.rounds):
            for name, checkout in sides.items():
                copy = Path(temporary) / f"{number}-{checkout.name}"
                shutil.copytree(model, copy)
                gate = given.min_cosine
                if checkout != _HERE and given.before_min_cosine:
                    gate = given.before_min_cosine
                figures = _measured(checkout, copy, given.flavour, gate)
                print(f"{name:32}{figures}", flush=True)
                shutil.rmtree(copy)


def _measured(checkout: Path, model: Path, flavour: str, min_cosine: str) -> str:
    command = [sys.executable, "-c", "from mmvision_export.cli.entry import main; main()"]
    command += ["quantize", f"--{flavour}", "--model", str(model)]
    command += ["--min-cosine", min_cosine]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=model,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{checkout}: {out}")
    report = next(iter(Manifest.read(model).quantization.values()))
    units = len(report["kept"]) + len(report["quantized"])
    cpu = used.ru_utime + used.ru_stime
    return (
        f"{seconds:10.1f}{cpu:10.1f}{used.ru_maxrss / 1024:10.0f}{len(report['kept']):8}{units:6}"
        f"  {report['reached']:.6f}"
    )


if __name__ == "__main__":
    main()
