"""Encode a video, segment by segment, in memory that does not grow with its length.

    python examples/video.py --model engines/tiny --fps 2 clip.mp4

Prints a line of JSON for each segment: when its frames were shown, its grid and its image tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mmvision_export import VisionEncoder


def main() -> None:
    """Encode the segments as they are decoded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="model directory, or an engine")
    parser.add_argument("--fps", type=float, default=1.0, help="frames to sample per second")
    options = parser.parse_args()
    with VisionEncoder.open(options.model) as encoder:
        for segment in encoder.encode_video(options.video, fps=options.fps):
            embeds = segment.image_embeds  # [image tokens, text_hidden_size]
            line = {
                "seconds": [round(float(second), 3) for second in segment.timestamps],
                "grid_thw": np.asarray(segment.grid_thw).tolist(),
                "tokens": embeds.shape[0],
                "mean_norm": round(float(np.linalg.norm(embeds, axis=1).mean()), 4),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
