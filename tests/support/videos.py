"""Videos made for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is not installed")


def write_video(path: Path, frames: np.ndarray, fps: int = 4) -> Path:
    """A lossless video of these frames, `[n, h, w, 3]` uint8."""
    with av.open(str(path), "w") as container:
        codec = "png" if path.suffix in (".mov", ".mp4") else "ffv1"
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if codec == "png" else "bgr0"
        for levels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode())
    return path


def moving(frames: int, height: int = 56, width: int = 84) -> np.ndarray:
    """Smooth, moving, and different in every channel."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    waves = [np.sin((y + 3 * t) / 9), np.cos((x - 2 * t) / 11), np.sin((x + y + t) / 13)]
    return np.stack([(127 + 120 * w).astype(np.uint8) for w in waves], axis=-1)
