"""What calibration measures.

The tensors that products read, run on calibration batches in ONNX Runtime.

Memory is bounded: the graph's weights stay in their file, which the runtime maps once; a batch is
cut between images as the planner of launches cuts it; and tensors are captured in stages of at most
`STAGE_BYTES`. Of a tensor only its channels' magnitudes, a histogram and a fixed number of sample
rows are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.errors import QuantizationError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.quantize.choices import CalibrationMethod
from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, create_session
from mmvision_export.runtime.launch_planner import LaunchPlanner

__all__ = [
    "HEADROOM",
    "Batch",
    "Samples",
    "grouped",
    "magnitudes",
    "outputs_of",
    "run",
    "samples",
    "values_of",
]

Batch = tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]
Array = npt.NDArray[np.float32]

STAGE_BYTES = 1 << 30
SAMPLE_ROWS = 128
HEADROOM = 1.25
"""By how much a range is larger than the largest value measured.

A token of another image may be beyond what calibration has seen, and what is cut off of it costs far more
than coarser steps cost all others. With 32 layers of full width and outlier weights, one token in 646 of
images held out was 1.2 to 1.3 times as large, in the input of every MLP from layer 25 on. This token lost
9.4e-4 of its cosine where every other one lost less than 1.1e-4 (seeded random images).
"""
PERCENTILE = 99.999
# TensorRT's calibrator had 2048 bins; ONNX Runtime's search takes time with their square.
HISTOGRAM_BINS = {"percentile": 2048, "entropy": 512}


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is kept of one tensor `[N, channels]`.

    Attributes:
        magnitude: Largest magnitude of each channel, `[channels]`.
        rows: Some of its rows, `[at most 128, channels]`: the same patches for every tensor of as
            many rows.
    """

    magnitude: Array
    rows: Array


def grouped(batches: Sequence[Batch], config: EncoderConfig) -> list[Batch]:
    """Batches cut between images as a graph with masked attention is run."""
    plan = LaunchPlanner([], Costs(config, masked=True))
    groups = []
    for pixel_values, rows in batches:
        batch = PackedBatch(pixel_values, PackedGrid(rows, config.patches_per_token))
        for launch in plan(batch.grid):
            group = batch.images(launch.images)
            groups.append((group.pixel_values, group.grid.rows))
    return groups


def run(
    graph: Path | bytes, batches: Sequence[Batch], *, weights_in: Path, dtype: type[np.floating]
) -> list[Array]:
    """Image embeddings of every batch, float32, with every Q/DQ pair computed as the graph says.

    Args:
        graph: A file, or a model without its external weights.
        batches: Patches and grids.
        weights_in: Folder of the external weights.
        dtype: The graph's float type.
    """
    return list(outputs_of(graph, batches, weights_in=weights_in, dtype=dtype))


def outputs_of(
    graph: Path | bytes,
    batches: Iterable[Batch],
    *,
    weights_in: Path,
    dtype: type[np.floating],
) -> Iterator[Array]:
    """Image embeddings of one batch after the other, as `run` gives them."""
    session = _session(graph, weights_in)
    for pixels, grid in batches:
        yield session.run(None, {"pixel_values": pixels.astype(dtype), "grid_thw": grid})[0].astype(
            np.float32
        )


def values_of(
    graph: Path, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    """All of these tensors at once, of one batch after the other.

    Args:
        graph: The float32 graph.
        names: Of tensors, and of the graph's inputs.
        batches: Small ones: everything is held.
    """
    model = ir.load(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    captured = [name for name in dict.fromkeys(names) if name in values]
    model.graph.outputs[:] = [values[name] for name in captured]
    session = _session(ir.serde.serialize_model(model).SerializeToString(), graph.parent)
    for pixels, grid in batches:
        feed: dict[str, Any] = {"pixel_values": pixels.astype(np.float32), "grid_thw": grid}
        yield {**dict(zip(captured, session.run(None, feed), strict=True)), **feed}


def samples(
    graph: Path, names: Sequence[str], batches: Sequence[Batch], progress: Progress
) -> dict[str, Samples]:
    """Channel magnitudes and sample rows of tensors of a graph.

    Raises:
        QuantizationError: A tensor is not finite.
    """
    found: dict[str, Samples] = {}
    per_batch = -(-SAMPLE_ROWS // len(batches))
    for name, values in _captured(graph, names, batches, progress, "measuring activations"):
        if not np.isfinite(values).all():
            raise QuantizationError(
                f"{name} is not finite in float32", hint="check the model with: mmvision parity"
            )
        magnitude = np.abs(values).max(axis=0)
        rows = values[np.linspace(0, len(values) - 1, min(per_batch, len(values))).astype(int)]
        if (before := found.get(name)) is not None:
            magnitude = np.maximum(magnitude, before.magnitude)
            rows = np.concatenate([before.rows, rows])
        found[name] = Samples(magnitude, rows)
    return found


def magnitudes(
    graph: Path,
    found: Mapping[str, Samples],
    divisors: Mapping[str, Array],
    batches: Sequence[Batch],
    method: CalibrationMethod,
    progress: Progress,
) -> dict[str, float]:
    """The magnitude at which each tensor is to be cut off, once its channels have been divided.

    Args:
        graph: The float32 graph.
        found: `samples` of the tensors.
        divisors: For some tensors, what each channel is divided by, `[channels]`.
        batches: Those the samples are of.
        method: `minmax` cuts nothing off, and of other images what is beyond `HEADROOM`;
            `percentile` cuts off the largest 0.001 % of values; `entropy` chooses the least
            Kullback-Leibler divergence. The last two are ONNX Runtime's.
        progress: Told about each step.
    """
    largest = {
        name: float((s.magnitude / divisors.get(name, np.float32(1))).max())
        for name, s in found.items()
    }
    if method == "minmax":
        return {name: HEADROOM * magnitude for name, magnitude in largest.items()}
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method,
        symmetric=True,
        num_bins=HISTOGRAM_BINS[method],
        num_quantized_bins=128,
        percentile=PERCENTILE,
        scenario="same",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        for name, magnitude in largest.items():  # the bins' range, from the first batch on
            collector.collect({name: np.array([-magnitude, magnitude], np.float32)})
        for name, values in _captured(graph, list(found), batches, progress, "calibrating"):
            collector.collect({name: values / divisors.get(name, np.float32(1))})
        progress.step("choosing ranges")
        ranges = collector.compute_collection_result()
    return {
        name: min(largest[name], float(max(-low, high))) for name, (low, high, *_) in ranges.items()
    }


def _captured(
    graph: Path,
    names: Sequence[str],
    batches: Sequence[Batch],
    progress: Progress,
    description: str,
) -> Iterator[tuple[str, Array]]:
    model = ir.load(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    stages = _stages([values[name] for name in names], max(len(pixels) for pixels, _ in batches))
    outputs = list(model.graph.outputs)
    progress.step(description, total=len(stages) * len(batches))
    for stage in stages:
        # A graph's input cannot be its output too.
        inputs = [value for value in stage if value in model.graph.inputs]
        captured = [value for value in stage if value not in inputs]
        model.graph.outputs[:] = captured or outputs
        session = _session(ir.serde.serialize_model(model).SerializeToString(), graph.parent)
        for pixels, grid in batches:
            feed: dict[str, Any] = {"pixel_values": pixels.astype(np.float32), "grid_thw": grid}
            if captured:
                for value, array in zip(captured, session.run(None, feed), strict=True):
                    yield str(value.name), array
            for value in inputs:
                yield str(value.name), feed[str(value.name)]
            progress.advance()


def _stages(values: Sequence[ir.Value], patches: int) -> list[list[ir.Value]]:
    stages: list[list[ir.Value]] = [[]]
    held = 0
    for value in values:
        assert value.shape is not None and isinstance(value.shape[-1], int)
        size = patches * value.shape[-1] * 4
        if stages[-1] and held + size > STAGE_BYTES:
            stages.append([])
            held = 0
        stages[-1].append(value)
        held += size
    return stages


def _session(graph: Path | bytes, weights_in: Path) -> Any:
    # As the graph says it: no integer kernels in place of Q/DQ, whose rounding differs from one
    # processor to another.
    exact = {"session.disable_quant_qdq": "1"}
    return create_session(
        graph, provider=PROVIDERS["onnxruntime-cpu"], weights_in=weights_in, entries=exact
    )
