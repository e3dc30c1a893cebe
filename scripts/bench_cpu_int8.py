"""Speed of a model directory's cpu-int8 flavour against its float32 graph, interleaved in one process.

python scripts/bench_cpu_int8.py DIR [patches] [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from mmvision_export.metrics import metrics
from mmvision_export.runtime import VisionEncoder
from mmvision_export.sample_batches import sample_batch


def compare(directory: Path, patches: int = 1024, rounds: int = 5) -> dict[str, float]:
    """Median and fastest seconds of both, the ratio of medians, and the smallest cosine of a token."""
    flavours = {"fp32": None, "cpu-int8": "cpu-int8"}
    encoders = {
        name: VisionEncoder.open(directory, backend="onnxruntime-cpu", flavour=flavour)
        for name, flavour in flavours.items()
    }
    side = int((patches // 4) ** 0.5)
    pixel_values, grid_thw = sample_batch(((1, side, side),), encoders["fp32"].config, seed=0)
    results = {name: encoder(pixel_values, grid_thw) for name, encoder in encoders.items()}  # and warms up
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encoder in encoders.items():
            start = time.perf_counter()
            encoder(pixel_values, grid_thw)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name} median seconds": value for name, value in median.items()},
        **{f"{name} fastest seconds": min(values) for name, values in seconds.items()},
        "speedup": median["fp32"] / median["cpu-int8"],
        "min_cosine": metrics(results["cpu-int8"], results["fp32"]).min_cosine,
    }


if __name__ == "__main__":
    for name, value in compare(Path(sys.argv[1]), *map(int, sys.argv[2:])).items():
        print(f"{name:24}{value:.4f}")
