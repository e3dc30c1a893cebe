"""Encode every image below a folder, once: a second run does only what is missing.

    python examples/folder.py --model engines/tiny --output embeds photos

Prints a line of JSON for each file, and exits with 1 if one could not be encoded. For very many
images take `mmvision embed`, which writes a table instead of a file for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import InputError


def encode(encoder: VisionEncoder, path: Path, target: Path) -> dict[str, object]:
    """Encode one file into another that appears whole or not at all."""
    if target.exists():
        return {"status": "already_there"}
    try:
        (embeds,) = encoder.encode_images(path)
    except InputError as error:  # no image, or one that is too large: the others go on
        return {"status": "failed", "error": error.message}
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}")
    with unfinished.open("wb") as file:
        np.save(file, embeds)
    unfinished.replace(target)
    return {"status": "encoded", "tokens": embeds.shape[0]}


def main() -> None:
    """Go through the folder by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="model directory, or an engine")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .npy files")
    options = parser.parse_args()
    failed = 0
    with VisionEncoder.open(options.model) as encoder:
        for path in sorted(each for each in options.folder.rglob("*") if each.is_file()):
            name = path.relative_to(options.folder)
            line = encode(encoder, path, options.output / f"{name}.npy")
            failed += line["status"] == "failed"
            print(json.dumps({"image": str(path), **line}), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
