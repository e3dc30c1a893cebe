"""Ask a Triton Inference Server for the embeddings of image files.

    mmvision triton-repository --model engines/tiny --output models
    tritonserver --model-repository models --model-control-mode explicit --load-model vision_encoder
    python examples/triton_client.py --url 127.0.0.1:8000 photo.jpg scan.png

Needs `pip install 'tritonclient[http]'` and neither the model nor this package: the server decodes
the files. Prints a line of JSON for each image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import tritonclient.http as triton


def main() -> None:
    """Send all images in one request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--url", default="127.0.0.1:8000", help="host and port of HTTP")
    parser.add_argument("--model", default="vision_encoder", help="its name in the repository")
    options = parser.parse_args()
    # [1, images]: the leading dimension stands for the request.
    files = np.array([[path.read_bytes() for path in options.images]], dtype=object)
    image = triton.InferInput("image", list(files.shape), "BYTES")
    image.set_data_from_numpy(files)
    client = triton.InferenceServerClient(options.url)
    try:
        result = client.infer(options.model, [image])
    finally:
        client.close()
    image_embeds = result.as_numpy("image_embeds")[0]  # [tokens of all images, text_hidden_size]
    counts = result.as_numpy("tokens_per_image")[0]
    per_image = np.split(image_embeds, np.cumsum(counts)[:-1])
    for path, embeds in zip(options.images, per_image, strict=True):
        norm = float(np.linalg.norm(embeds.astype(np.float32), axis=1).mean())
        line = {"image": str(path), "tokens": embeds.shape[0], "mean_norm": round(norm, 4)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
