"""Input for `polygraphy run`.

A batch that its own random generator cannot make, since the grid must add up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def load_data() -> Iterator[dict[str, np.ndarray]]:
    """Two images of different size."""
    pixels = np.random.default_rng(0).standard_normal((40, 1176)).astype(np.float32)
    yield {"pixel_values": pixels, "grid_thw": np.array([[1, 4, 4], [1, 4, 6]], dtype=np.int64)}
