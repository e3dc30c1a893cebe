"""What `VisionEncoder` adds to a call, and how long its import takes.

`python scripts/measure_overhead.py`.

Overhead: validation, planning and padding of 8 images of 1,024 patches, in a call to a backend that
computes nothing, by the clock. The finite check reads all patches once, so that the speed of memory
is its limit; it is shown apart, from the same runs. Import: a new interpreter each time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from mmvision_export.artifacts.profile import profiles_from_buckets
from mmvision_export.core.finite import finite_rows
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.backends import BackendInfo
from mmvision_export.runtime.launch_planner import LaunchPlanner
from mmvision_export.runtime.vision_encoder import VisionEncoder

CALLS = 200


class Nothing:
    """A backend that plans and pads as an engine's does, and then computes nothing."""

    name = "onnxruntime-cpu"

    def __init__(self) -> None:
        self.config = EncoderConfig()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.profiles = profiles_from_buckets([256, 1024, 2304, 4096], [64], self.config)
        self.info = BackendInfo(runtime="none", version="", precision="fp32", weights_sha256="")
        self._planner = LaunchPlanner(self.profiles, Costs(self.config, masked=True))
        self.largest_image = self._planner.largest_image
        self.guard = None
        self.is_isolated = True
        self._out = np.zeros((2048, 1), np.float32)

    def run(self, batch: PackedBatch) -> np.ndarray:
        """Plan and pad."""
        self._planner.layouts(batch.grid)
        return self._out

    def close(self) -> None:
        """Nothing is held."""


def main() -> None:
    """Measure and print JSON."""
    encoder = VisionEncoder(Nothing(), PreprocessorConfig())  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).standard_normal((8 * 1024, 1176)).astype(np.float32)
    same = np.array([(1, 32, 32)] * 8)
    # Eight rows of four shapes of 1,024 patches each: more batches than there are calls, and so
    # never one again.
    shapes = np.array([(1, 32, 32), (1, 16, 64), (1, 64, 16), (1, 8, 128)])
    fresh = [shapes[[call >> 2 * row & 3 for row in range(8)]] for call in range(1, CALLS + 1)]
    times: dict[str, list[float]] = {
        "a grid seen before": [],
        "a new grid": [],
        "of it, reading the patches once": [],
    }
    for new in fresh:
        for name, call in (
            ("a grid seen before", lambda: encoder(pixels, same)),
            ("a new grid", lambda new=new: encoder(pixels, new)),
            (
                "of it, reading the patches once",
                lambda: finite_rows(pixels),
            ),
        ):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    statement = "from mmvision_export import VisionEncoder"
    program = (
        f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    )
    imports = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(5)
    ]
    overhead = {
        name: {
            "median": round(statistics.median(seconds) * 1e3, 3),
            "minimum": round(min(seconds) * 1e3, 3),
        }
        for name, seconds in times.items()
    }
    import_ms = round(statistics.median(imports) * 1e3)
    print(json.dumps({"overhead_ms": overhead, "import_ms": import_ms, "calls": CALLS}, indent=2))


if __name__ == "__main__":
    main()
