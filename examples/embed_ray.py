"""Embed a folder of images on Ray, and read the table that it wrote.

    python examples/embed_ray.py --model engines/tiny --output table --workers 2 photos

Needs `pip install '.[cpu,ray]'`. `mmvision embed --workers 2` does the same. Ray is started on this
machine; `--ray auto` takes a cluster, which has not been tried.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow.parquet

from mmvision_export.embed.on_ray import RayWorkers
from mmvision_export.embed.run import embed
from mmvision_export.embed.stored import array_from_cell


def main() -> None:
    """Embed what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--model", type=Path, required=True, help="model directory, or an engine")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--workers", type=int, default=2, help="actors, each with an encoder")
    parser.add_argument("--ray", metavar="ADDRESS", help="a cluster's address")
    options = parser.parse_args()
    workers = RayWorkers(count=options.workers, address=options.ray)
    done = embed(options.folder, options.output, options.model, workers=workers)
    print(json.dumps({"embedded": done.embedded, "failed": done.failed, "rows": done.rows}))
    table = pyarrow.parquet.read_table(options.output / "embeddings")
    metadata = table.schema.metadata
    dtype, width = metadata[b"dtype"].decode(), int(metadata[b"width"])
    for row in table.to_pylist():
        embeds = array_from_cell(row["embeddings"], dtype, width)  # [tokens, width]
        line = {"image": row["id"], "grid_thw": list(row["grid_thw"]), "tokens": embeds.shape[0]}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
