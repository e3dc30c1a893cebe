"""An encoder at work for long: eight threads, mixed batches, a video again and again.

`python -m tests.reliability.soak --batches 10000` runs as many; docs/reliability.md has the last figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mmvision_export import VisionEncoder
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.weights import WeightSource
from tests.support.configs import HEAD_DIM_80, relative_l2
from tests.support.videos import moving, write_video

__all__ = ["Sample", "soak"]

Sample = dict[str, Any]
_IMAGES = 40


def soak(
    encoder: VisionEncoder,
    video: Path,
    batches: int,
    *,
    tolerance: float = 0.0,
    samples: int = 10,
    leak: bool = False,
) -> list[Sample]:
    """Encode many batches and videos, and say from time to time what the process holds.

    Each batch is a choice of 40 images in any order, and its result must be that of each image alone.

    Args:
        encoder: An encoder whose images cannot reach each other.
        video: A video, which one more thread encodes over and over.
        batches: How many, on eight threads.
        tolerance: Largest relative L2 distance of a batch; 0 means equal to the bit.
        samples: How often the process is measured.
        leak: The control: keep every result.

    Raises:
        AssertionError: A result is another one.
    """
    chance = np.random.default_rng(0)
    sizes = [(1 + n % 2, 2 + 2 * (n % 5), 2 + 2 * (n % 7)) for n in range(_IMAGES)]
    images = [
        chance.standard_normal((t * h * w, encoder.config.patch_dim)).astype(np.float32)
        for t, h, w in sizes
    ]
    alone = [encoder(pixels, [size]) for pixels, size in zip(images, sizes, strict=True)]
    of_video = _video(encoder, video)
    kept: list[Any] = []
    stop = threading.Event()

    def is_same(result: Any, expected: Any) -> bool:
        if tolerance == 0.0:
            return np.array_equal(result, expected)
        return relative_l2(result, expected) <= tolerance

    def one(number: int) -> None:
        chosen = random.Random(number).sample(range(_IMAGES), 1 + number % 8)
        result = encoder(
            np.concatenate([images[index] for index in chosen]), [sizes[index] for index in chosen]
        )
        expected = np.concatenate([alone[index] for index in chosen])
        assert is_same(result, expected), f"batch {number} of images {chosen}"
        if leak:
            kept.append(np.repeat(result, 10, axis=0))

    def videos() -> int:
        count = 0
        while not stop.is_set():
            assert is_same(_video(encoder, video), of_video)
            count += 1
        return count

    process = psutil.Process()
    measured: list[Sample] = []
    with ThreadPoolExecutor(9) as pool:
        begin = time.monotonic()
        looping = pool.submit(videos)
        try:
            for part in np.array_split(np.arange(batches), samples):
                list(pool.map(one, part.tolist()))
                measured.append(
                    {
                        "batches": int(part[-1]) + 1,
                        "seconds": round(time.monotonic() - begin, 1),
                        "resident_mib": round(process.memory_info().rss / 2**20, 1),
                        "handles": process.num_fds(),
                        "threads": process.num_threads(),
                    }
                )
        finally:
            stop.set()
        measured[-1]["videos"] = looping.result()
    # At the end as at the beginning.
    for pixels, size, expected in zip(images, sizes, alone, strict=True):
        assert is_same(encoder(pixels, [size]), expected)
    return measured


def _video(encoder: VisionEncoder, video: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([segment.image_embeds for segment in encoder.encode_video(video, fps=2)])


def main(arguments: Sequence[str]) -> None:
    """Print what the process holds after each tenth of the batches."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--backend", default="onnxruntime-cpu")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative L2 of a batch")
    parser.add_argument("--leak", action="store_true", help="the control, which must grow")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            os.environ[variable] = str(Path(folder) / variable)
        export_model_directory(
            WeightSource(random_config=HEAD_DIM_80, seed=1), Path(folder) / "model"
        )
        video = write_video(Path(folder) / "video.mov", moving(24))
        with VisionEncoder.open(
            Path(folder) / "model", backend=given.backend, threads=1
        ) as encoder:
            for sample in soak(
                encoder, video, given.batches, tolerance=given.tolerance, leak=given.leak
            ):
                print(json.dumps(sample), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
