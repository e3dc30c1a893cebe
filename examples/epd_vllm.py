"""Encode images apart from vLLM, which then finds their embeddings in its encoder cache.

    python examples/epd_vllm.py --model engines/MiniMax-M3 --output /shared/ec photo.jpg scan.png

Prints, for each image, the UUID that a request to vLLM has to give it, and how many tokens it has.
The UUID is the hash of the file: the same file is encoded and written once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from mmvision_export import VisionEncoder
from mmvision_export.integrations.image_embedder import ImageEmbedder
from mmvision_export.integrations.vllm import encoder_cache_file, write_encoder_cache


def main() -> None:
    """Encode what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="vLLM's shared_storage_path")
    options = parser.parse_args()
    by_uuid = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in options.images}
    new = {
        uuid: path
        for uuid, path in by_uuid.items()
        if not encoder_cache_file(options.output, uuid).exists()
    }
    tokens: dict[str, int] = {}
    if new:
        with VisionEncoder.open(options.model) as encoder:
            embeds = ImageEmbedder(encoder).encode_images(list(new.values()))
        for uuid, each in zip(new, embeds, strict=True):
            write_encoder_cache(options.output, uuid, each)
            tokens[uuid] = each.shape[0]
    for uuid, path in by_uuid.items():
        print(json.dumps({"image": str(path), "uuid": uuid, "new_tokens": tokens.get(uuid, 0)}))


if __name__ == "__main__":
    main()
