"""What an engine should give, by ONNX Runtime on the CPU, and what rounding alone costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.core.metrics import Metrics, metrics
from mmvision_export.core.progress import Progress
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.parity.graphs import graphs_from_directory
from mmvision_export.parity.samples import Sample, samples_from_grids
from mmvision_export.parity.sessions import arrays_from_model
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["Reference", "engine_precision", "reference_from_directory"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Results to hold engines to.

    Attributes:
        samples: The batches.
        expected: Sample -> image_embeds `[num_image_tokens, text_hidden_size]`.
        beside: Sample -> distance of the engines' graph from that, every result of it rounded to
            its type as a GPU rounds it. The gate allows an engine a multiple. Empty where that is
            itself what is expected.
    """

    samples: Sequence[Sample]
    expected: Mapping[str, npt.NDArray[np.floating]]
    beside: Mapping[str, Metrics]


def engine_precision(manifest: Manifest) -> str:
    """Of the engines of a model directory: 16 bits, which all ways of attention take."""
    return "fp16" if manifest.precision == "fp32" else manifest.precision


def reference_from_directory(
    directory: Path, *, samples: Sequence[Sample] = (), progress: Progress | None = None
) -> Reference:
    """Compute the reference, and derive the graph that engines are built from if it is not there.

    In a bfloat16 directory the rounded graph is all that the CPU can run: it is what is expected,
    and engines are held to the gate's smallest cosine.

    Args:
        directory: A model directory that may be changed.
        samples: The batches; those of `mmvision parity` if empty.
        progress: Told about each step.

    Raises:
        ManifestError: Files are missing or damaged.
        ExportError: The float16 graph does not compute the same as the float32 one.
        BackendError: ONNX Runtime is not installed, or failed.
    """
    progress = progress or Progress()
    manifest = Manifest.read(directory)
    samples = list(samples) or samples_from_grids(manifest.config)
    name = GRAPH
    if engine_precision(manifest) != manifest.precision:
        name = derive_fp16(directory, manifest, progress=progress)
    graph = graphs_from_directory(directory, manifest, [name])[name]
    progress.step("computing the reference on the CPU", 2 * len(samples))
    output = list(graph.rounded.graph.outputs)
    rounded = {}
    for sample in samples:
        rounded[sample.name] = arrays_from_model(graph.rounded, directory, sample, output)[0]
        progress.advance()
    if manifest.precision == "bf16":
        return Reference(samples, rounded, {})
    expected = {}
    with VisionEncoder.open(directory, backend="onnxruntime-cpu") as encoder:
        for sample in samples:
            expected[sample.name] = encoder(sample.pixel_values, sample.grid_thw)
            progress.advance()
    beside = {key: metrics(rounded[key], expected[key]) for key in expected}
    return Reference(samples, expected, beside)
