"""What a flavour is measured on, and how far from the gate it has to stay.

**The margin.** A gate is for photographs that are still to come. Of n images that were checked and
one more, each is equally likely to be the worst: the next one loses more than all of them with
probability 1 / (n + 1). By how much more is the tail of the loss. The loss of a token is the square
of an error, and has finite variance where the error has finite fourth moments: its tail then falls
at least as the inverse square. So the next image loses more than `MARGIN` times the worst one with
probability of at most about `1 / ((n + 1) * MARGIN**2)`: 5 % for 8 images and a margin of 1.5, 1 %
for 32. The graph therefore has to keep `1 - cosine` to 1 / 1.5 of what the gate allows. Units are chosen
on the same images, which makes this estimate too low.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmvision_export.core.progress import Progress
from mmvision_export.quantize.statistics import Batch, outputs_of

__all__ = ["LEAST_HELD_OUT", "MARGIN", "Checks", "chance_of_worse", "losses"]

Array = npt.NDArray[np.float32]
Losses = npt.NDArray[np.float64]

MARGIN = 1.5
LEAST_HELD_OUT = 8


def chance_of_worse(images: int) -> float:
    """That a further image loses more than `MARGIN` times the worst of so many: see above."""
    return 1 / ((images + 1) * MARGIN**2)


def losses(result: Array, reference: Array) -> Losses:
    """By how much each token's cosine is below 1, `[tokens]`; infinite where it is not finite."""
    a, b = result.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = (a * b).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    lost: Losses = np.where(np.isfinite(cosine), 1 - np.minimum(cosine, 1), np.inf)
    return lost


@dataclasses.dataclass(frozen=True)
class Checks:
    """The images that a graph is checked on, and what the float32 graph makes of them.

    Attributes:
        held_out: Images that calibration has not seen.
        calibration: Images that it has seen.
        references: A folder with the embeddings of all of them, which may be more than memory holds.
    """

    held_out: Sequence[Batch]
    calibration: Sequence[Batch]
    references: Path

    @property
    def batches(self) -> dict[str, Batch]:
        """All of them, by name."""
        parts = {"held_out": self.held_out, "calibration": self.calibration}
        return {
            f"{part}.{index}.npy": batch
            for part, batches in parts.items()
            for index, batch in enumerate(batches)
        }

    def refer_to(self, graph: Path, progress: Progress) -> None:
        """Write the references: the embeddings of a float32 graph."""
        batches = self.batches
        progress.step("running the float32 graph", total=len(batches))
        results = outputs_of(graph, batches.values(), weights_in=graph.parent, dtype=np.float32)
        for name, result in zip(batches, results, strict=True):
            np.save(self.references / name, result)
            progress.advance()

    def losses(self, name: str, result: Array) -> Losses:
        """What each token of a batch loses, given its embeddings."""
        return losses(result, np.load(self.references / name, mmap_mode="r"))
