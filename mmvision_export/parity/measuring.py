"""What a runner gives on each sample, and how far that lies from the reference.

One runner is loaded at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException

from mmvision_export.core.errors import ParityError
from mmvision_export.core.metrics import Metrics, metrics, token_errors
from mmvision_export.core.progress import Progress
from mmvision_export.engine.polygraphy_setup import captured_messages
from mmvision_export.parity.runners import TorchRunner, accepts
from mmvision_export.parity.samples import Sample

__all__ = [
    "Distance",
    "Embeds",
    "distance_from_embeds",
    "distances_from_runners",
    "embeds_from_runner",
    "runner_errors",
]

Embeds = npt.NDArray[np.floating]
"""image_embeds `[num_image_tokens, text_hidden_size]`."""

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far image embeddings lie from the reference's.

    Attributes:
        metrics: Of all tokens together.
        token_errors: Relative L2 difference of each image token, `[num_image_tokens]`.
    """

    metrics: Metrics
    token_errors: npt.NDArray[np.float64]


@contextlib.contextmanager
def runner_errors() -> Iterator[None]:
    """Raise what Polygraphy and its runners report, while the block runs, as one error.

    Raises:
        ParityError: Polygraphy raised an exception.
    """
    with captured_messages() as messages:
        try:
            yield
        except PolygraphyException as error:
            raise ParityError("\n  ".join(dict.fromkeys([*messages, str(error)]))) from error


def embeds_from_runner(
    runner: BaseRunner, samples: Sequence[Sample], *, progress: Progress
) -> dict[str, Embeds]:
    """Sample -> what an active runner gives on it, of the samples that it takes."""
    # A runner may give the same buffer again at its next call.
    return _measured(runner, samples, lambda _, embeds: embeds.copy(), progress)


def distances_from_runners(
    runners: Sequence[BaseRunner],
    samples: Sequence[Sample],
    *,
    reference: Mapping[str, Embeds],
    progress: Progress,
) -> dict[str, dict[str, Distance]]:
    """Runner -> sample -> distance from the reference. Each runner is loaded only while it runs."""

    def distance(sample: Sample, embeds: Embeds) -> Distance:
        return distance_from_embeds(embeds, reference=reference[sample.name])

    found = {}
    for runner in runners:
        with runner:
            found[runner.name] = _measured(runner, samples, distance, progress)
    return found


def distance_from_embeds(embeds: Embeds, *, reference: Embeds) -> Distance:
    """How far embeddings lie from the reference's, of the same shape."""
    return Distance(metrics(embeds, reference), token_errors(embeds, reference))


def _measured(
    runner: BaseRunner,
    samples: Sequence[Sample],
    measure: Callable[[Sample, Embeds], _Found],
    progress: Progress,
) -> dict[str, _Found]:
    taken = []
    for sample in samples:
        if accepts(runner, sample.grid_thw.prod(axis=1).tolist()):
            taken.append(sample)
        else:
            progress.note(f"{runner.name} does not take {sample.name}, which is beyond its profile")
    layers = runner.num_layers if isinstance(runner, TorchRunner) else 1
    progress.step(f"running {runner.name}", total=len(taken) * layers)
    if isinstance(runner, TorchRunner):
        runner.on_layer = progress.advance
    inputs = runner.get_input_metadata(use_numpy_dtypes=False)
    dtype = DataType.to_dtype(inputs["pixel_values"].dtype, "numpy")
    found = {}
    for sample in taken:
        feed_dict = {
            "pixel_values": sample.pixel_values.astype(dtype),
            "grid_thw": sample.grid_thw,
        }
        found[sample.name] = measure(sample, runner.infer(feed_dict)["image_embeds"])
        if not isinstance(runner, TorchRunner):
            progress.advance()
    return found
