"""A check of seconds, right after export: one grid, in ONNX Runtime, against the PyTorch encoder.

It finds a graph that is another function. What a precision loses, and on which images, is what
`mmvision parity` is for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mmvision_export.core.errors import BackendError, ExportError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.sample_batches import Grid, sample_batch
from mmvision_export.runtime.backends.onnxruntime import create_session, require_provider

__all__ = ["QUICK_GRID", "QuickCheck"]

_CPU = "CPUExecutionProvider"
QUICK_GRID: Grid = ((1, 4, 6), (2, 2, 4))
"""An image and a video of two frames: attention must stay inside each, and time must count."""


class QuickCheck:
    """The encoder's embeddings on one grid, kept until the graph is there.

    The encoder may be let go before the graph is opened: both together would hold the weights twice.

    Args:
        encoder: As it is exported.
        precision: Of the graph.
    """

    def __init__(self, encoder: VisionEncoderModule, precision: str) -> None:
        self._precision = precision
        self._pixels, self._grid = sample_batch(QUICK_GRID, encoder.config, seed=0)
        with torch.inference_mode():
            patches = torch.from_numpy(self._pixels).to(encoder.dtype)
            self._expected = encoder(patches, torch.from_numpy(self._grid)).float().numpy()

    @property
    def obstacle(self) -> str | None:
        """Why ONNX Runtime cannot run the graph here; None if it can."""
        if self._precision == "bf16":
            return "ONNX Runtime has no bfloat16 operators on a CPU"
        try:
            require_provider(_CPU)
        except BackendError as error:
            return error.message
        return None

    def __call__(self, graph: Path, progress: Progress) -> None:
        """Compare a graph.

        Raises:
            ExportError: An output is not finite, or a token's cosine similarity is below the gate.
            BackendError: ONNX Runtime cannot run the graph.
        """
        progress.step(f"checking {graph.name} on one grid")
        session = create_session(graph, provider=_CPU)
        dtype = np.float16 if self._precision == "fp16" else np.float32
        feeds = {"pixel_values": self._pixels.astype(dtype), "grid_thw": self._grid}
        (found,) = session.run(None, feeds)
        distance, gate = metrics(found, self._expected), PRECISIONS[self._precision].gate.min_cosine
        if distance.non_finite or not distance.min_cosine >= gate:
            raise ExportError(
                f"{graph.name} does not compute the encoder's function on one grid: {distance.non_finite} values "
                f"not finite, smallest cosine {distance.min_cosine:.6f} (gate {gate})",
                hint="to keep the directory anyway, use --no-check; to look closer: mmvision parity",
            )
