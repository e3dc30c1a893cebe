"""Encode photographs, and save the embeddings of each.

    mmvision export --onnx --preset tiny --random-weights --output engines/tiny
    python examples/first_embedding.py --model engines/tiny --output embeds photo.jpg scan.png

Prints a line of JSON for each image. A file of the output holds `[image tokens, text_hidden_size]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mmvision_export import VisionEncoder


def main() -> None:
    """Encode all images as one packed batch, whatever their sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True, help="model directory, or an engine")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .npy files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with VisionEncoder.open(options.model) as encoder:
        backend = encoder.info["backend"]
        for path, embeds in zip(options.images, encoder.encode_images(options.images), strict=True):
            target = options.output / f"{path.name}.npy"
            np.save(target, embeds)
            tokens, width = embeds.shape
            line = {"image": str(path), "tokens": tokens, "width": width, "backend": backend}
            print(json.dumps({**line, "output": str(target)}))


if __name__ == "__main__":
    main()
