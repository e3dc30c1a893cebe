"""Folders of small images, and what `mmvision embed` makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmvision_export.embed.stored import array_from_cell

__all__ = ["cells_of", "embeddings_of", "failures_of", "images_in", "noise"]


def noise(seed: int, low: int = 56, high: int = 140) -> Image.Image:
    """A picture whose size and pixels are the seed's own."""
    generator = np.random.default_rng(seed)
    width, height = generator.integers(low, high, 2)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


def images_in(folder: Path, count: int) -> Path:
    """A folder of that many images, in two folders of its own."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        noise(index).save(folder / "ab"[index % 2] / f"{index:05}.png")
    return folder


def _tables(output: Path, name: str) -> list[Any]:
    import pyarrow.parquet as parquet

    return [parquet.read_table(path) for path in sorted((output / name).glob("*.parquet"))]


def cells_of(output: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Grid and bytes of each row of `embeddings/`; no id may be there twice."""
    rows = [row for table in _tables(output, "embeddings") for row in table.to_pylist()]
    assert Counter(row["id"] for row in rows).most_common(1)[0][1] == 1
    return {row["id"]: (tuple(row["grid_thw"]), row["embeddings"]) for row in rows}


def embeddings_of(output: Path) -> dict[str, np.ndarray]:
    """`[tokens, width]` of each row of `embeddings/`."""
    arrays: dict[str, np.ndarray] = {}
    for table in _tables(output, "embeddings"):
        facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        for row in table.to_pylist():
            arrays[row["id"]] = array_from_cell(
                row["embeddings"],
                facts["dtype"],
                int(facts["width"]),
            )
    return arrays


def failures_of(output: Path) -> dict[str, str]:
    """Errors by id; no id may be there twice."""
    rows = [row for table in _tables(output, "failures") for row in table.to_pylist()]
    found = {row["id"]: row["error"] for row in rows}
    assert len(found) == len(rows)
    return found
