"""How much memory one call of `VisionEncoder` takes: `python -m tests.support.peak_memory`.

Arguments: backend, model directory, grid as JSON. Prints JSON: the most that the process grew by in
the call, what was counted beforehand, and both of the grid's first image.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export import VisionEncoder


def status_bytes(name: str) -> int:
    """A line of `/proc/self/status`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(backend: str, directory: str, rows: list[list[int]]) -> dict[str, Any]:
    """One call on random patches, after one on a small image that warms the runtime up."""
    with VisionEncoder.open(directory, backend=backend) as encoder:
        width = encoder.config.patch_dim
        encoder(np.zeros((16, width), np.float32), [[1, 4, 4]])
        grid = np.array(rows)
        patches = int(grid.prod(axis=1).sum())
        pixels = np.random.default_rng(0).standard_normal((patches, width), dtype=np.float32)
        counted: Any = encoder.memory_for(int(grid[0].prod()))
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        start = time.perf_counter()
        image_embeds = encoder(pixels, grid)
        seconds = time.perf_counter() - start
        return {
            "peak_bytes": status_bytes("VmHWM") - before,
            "counted_bytes": counted.total,
            "seconds": seconds,
            "graph": encoder.info["graph"],
            "tokens": len(image_embeds),
        }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
