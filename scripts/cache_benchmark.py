"""What a hit of the embeddings cache takes beside a miss, on this machine.

    python scripts/cache_benchmark.py engines/shallow
    python scripts/cache_benchmark.py engines/shallow --image photo.jpg scan.png

Each line is one image: encoded, then found in memory, then found on the disk by a cache that holds
nothing in memory. Hits must equal the miss to the bit; the times are only told.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.integrations.embeds_cache import EmbedsCache
from mmvision_export.integrations.image_embedder import GivenImage, ImageEmbedder
from mmvision_export.integrations.image_embeds import ImageEmbeds

_SIDES = (224, 448, 672)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--image", type=Path, nargs="+", help="files; noise of three sizes if none")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    images: list[tuple[str, GivenImage]] = [(path.name, path) for path in options.image or ()]
    images = images or [(f"{side} x {side}", _noise(side)) for side in _SIDES]
    print("| image | tokens | miss (ms) | hit in memory (ms) | hit on disk (ms) | miss / hit |")
    print("| --- | --- | --- | --- | --- | --- |")
    with VisionEncoder.open(options.model) as encoder, tempfile.TemporaryDirectory() as folder:
        alone = ImageEmbedder(encoder)
        memory = ImageEmbedder(encoder, cache=EmbedsCache(folder=folder))
        disk = ImageEmbedder(encoder, cache=EmbedsCache(memory_bytes=0, folder=folder))
        for name, image in images:
            (made,) = memory.encode_images([image])
            miss, _ = _timed(alone, image, options.repeat)
            hits = [_timed(each, image, options.repeat) for each in (memory, disk)]
            for _, found in hits:
                if not np.array_equal(found.bits, made.bits):
                    raise SystemExit(f"{name}: a hit differs from the miss")
            times = [miss, *(hit for hit, _ in hits)]
            figures = " | ".join(f"{time_s * 1e3:.2f}" for time_s in times)
            ratios = " and ".join(f"{miss / hit:.0f}" for hit, _ in hits)
            print(f"| {name} | {made.shape[0]} | {figures} | {ratios} |")


def _timed(embedder: ImageEmbedder, image: GivenImage, repeat: int) -> tuple[float, ImageEmbeds]:
    """Median seconds, and the last result."""
    times: list[float] = []

    def once() -> ImageEmbeds:
        start = time.perf_counter()
        (embeds,) = embedder.encode_images([image])
        times.append(time.perf_counter() - start)
        return embeds

    found = _last(once, repeat)
    return statistics.median(times), found


def _last(step: Callable[[], ImageEmbeds], repeat: int) -> ImageEmbeds:
    for _ in range(repeat - 1):
        step()
    return step()


def _noise(side: int) -> bytes:
    levels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "JPEG")
    return content.getvalue()


if __name__ == "__main__":
    main()
