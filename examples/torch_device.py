"""Give the encoder torch tensors where they are, and get torch tensors back.

    python examples/torch_device.py --model engines/tiny photo.jpg scan.png

With a TensorRT engine and a GPU, patches and embeddings stay on the device and the work goes into
torch's current stream. On a CPU the same lines work without a copy. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mmvision_export import VisionEncoder
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder


def main() -> None:
    """Encode the images as one packed batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True, help="model directory, or an engine")
    options = parser.parse_args()
    with VisionEncoder.open(options.model) as encoder:
        # Engines take device memory; ONNX Runtime and OpenVINO take host memory.
        on_gpu = torch.cuda.is_available() and encoder.facts.engine is not None
        device = torch.device("cuda" if on_gpu else "cpu")
        batch = ImageDecoder(encoder.preprocessor).batch(options.images, dtype=encoder.dtype)
        pixel_values = torch.from_numpy(batch.pixel_values).to(device)  # [patches, 1176]
        grid_thw = torch.tensor(batch.grid.tuples())  # [images, 3], on the host
        stream = torch.cuda.current_stream() if on_gpu else None
        image_embeds = encoder(pixel_values, grid_thw, stream=stream)  # [tokens, text_hidden_size]
        per_image = image_embeds.float().split(batch.grid.tokens_per_image)
        for path, embeds in zip(options.images, per_image, strict=True):
            line = {
                "image": str(path),
                "tokens": embeds.shape[0],
                "device": str(image_embeds.device),
                "mean_norm": round(embeds.norm(dim=1).mean().item(), 4),
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
