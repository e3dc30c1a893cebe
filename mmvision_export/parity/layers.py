"""How far each graph, and PyTorch, lies from the encoder in float64, stage by stage.

One model is in memory at a time. The float64 encoder's outputs wait on disk, where they are mapped,
not read whole; of every other result only the distances are kept.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmvision_export.artifacts.manifest import UNIFORM_GRAPH
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.slots import slots_from_batch
from mmvision_export.parity.encoders import Encoders
from mmvision_export.parity.graphs import LoadedGraph
from mmvision_export.parity.jump import Jump, StageDistance, expected_errors, first_jump
from mmvision_export.parity.magnitudes import Magnitude, observed_magnitudes
from mmvision_export.parity.samples import Sample
from mmvision_export.parity.sessions import arrays_from_model
from mmvision_export.parity.stages import (
    GraphFacts,
    stage_modules,
    stage_names,
    stage_shapes,
    stage_values,
)

__all__ = ["GraphStages", "LayerComparison", "compare_layers"]


@dataclasses.dataclass(frozen=True)
class GraphStages:
    """One graph, stage by stage.

    Attributes:
        facts: Its precision and float type.
        stages: In order of computation.
        jump: The first stage where the error jumps, if one does.
        missing: Stages that the graph has no value for.
    """

    facts: GraphFacts
    stages: list[StageDistance]
    jump: Jump | None
    missing: list[str]


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """All graphs of a model directory on one sample.

    Attributes:
        sample: Name of the sample.
        graphs: By file name.
        eager: Eager PyTorch's stages, by float type.
        magnitudes: Largest activation of each stage, in float64.
    """

    sample: str
    graphs: dict[str, GraphStages]
    eager: dict[str, list[StageDistance]]
    magnitudes: list[Magnitude]

    def expected(self, graph: GraphStages) -> list[float | None]:
        """The error that a graph's precision explains at each stage: `expected_errors`."""
        return expected_errors(graph.stages, _counterpart(graph.facts, self.eager))

    def summary(self, graph: str) -> dict[str, Any]:
        """What a manifest says of a graph's layers, as JSON values.

        Nothing of one that was not looked into.
        """
        if graph not in self.graphs:
            return {}
        jump = self.graphs[graph].jump
        largest = max(self.magnitudes, key=lambda magnitude: magnitude.value)
        return {
            "sample": self.sample,
            "first_jump": None if jump is None else {"stage": jump.stage, "reason": jump.reason},
            "largest_activation": {"value": largest.value, "where": largest.where},
        }


def _counterpart(
    facts: GraphFacts, eager: Mapping[str, list[StageDistance]]
) -> list[StageDistance] | None:
    return None if facts.is_quantized else eager[facts.float_type]


def compare_layers(
    sample: Sample,
    graphs: Mapping[str, LoadedGraph],
    *,
    encoders: Encoders,
    float_types: Sequence[str],
    progress: Progress | None = None,
) -> LayerComparison:
    """Compare every stage of every graph on one sample.

    Args:
        sample: The batch.
        graphs: By file name; left as they are.
        encoders: Load the encoder in float64 and in each float type.
        float_types: Those of the graphs, fp32, fp16 or bf16.
        progress: Told about each step.

    Raises:
        BackendError: ONNX Runtime cannot load or run a graph.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory(prefix="mmvision.", suffix=".stages") as folder:
        config = encoders.manifest.config
        names = stage_names(config)
        progress.step("layer by layer: PyTorch in float64", total=len(names))

        def save(stage: str, output: npt.NDArray[Any]) -> None:
            np.save(Path(folder) / stage, output)
            progress.advance()

        encoder = encoders.load_reference()
        with observed_magnitudes(encoder) as found:
            _run_torch(encoder, sample, save)
        del encoder

        def distance(stage: str, output: npt.NDArray[Any], float_type: str) -> StageDistance:
            return _distance(
                stage, output, np.load(Path(folder) / f"{stage}.npy", mmap_mode="r"), float_type
            )

        beside = {}
        for float_type in float_types:
            progress.step(f"layer by layer: PyTorch in {float_type}")
            beside[float_type] = _distances_of_torch(
                encoders.load(float_type), sample, partial(distance, float_type=float_type)
            )

        compared = {}
        for name, graph in graphs.items():
            facts = graph.facts
            progress.step(f"layer by layer: {name}")
            outputs = _run_graph(graph, sample, config)
            # Each is let go when it has been compared.
            rows = [
                distance(stage, outputs.pop(stage), facts.float_type)
                for stage in names
                if stage in outputs
            ]
            missing = [stage for stage in names if stage not in {row.stage for row in rows}]
            compared[name] = GraphStages(
                facts, rows, first_jump(rows, _counterpart(facts, beside)), missing
            )
    return LayerComparison(sample.name, compared, beside, [found[stage] for stage in names])


def _run_torch(
    encoder: VisionEncoderModule, sample: Sample, observe: Callable[[str, npt.NDArray[Any]], object]
) -> None:
    """Run the encoder, and show each stage's output to `observe` when it is there."""

    def hook(stage: str, _: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        # NumPy has no bfloat16.
        observe(stage, (output.float() if output.dtype == torch.bfloat16 else output).numpy())

    handles = [
        module.register_forward_hook(partial(hook, stage))
        for stage, module in stage_modules(encoder).items()
    ]
    try:
        with torch.inference_mode():
            encoder(
                torch.from_numpy(sample.pixel_values).to(encoder.dtype),
                torch.from_numpy(sample.grid_thw),
            )
    finally:
        for handle in handles:
            handle.remove()


def _distances_of_torch(
    encoder: VisionEncoderModule,
    sample: Sample,
    distance: Callable[[str, npt.NDArray[Any]], StageDistance],
) -> list[StageDistance]:
    rows: list[StageDistance] = []
    _run_torch(encoder, sample, lambda stage, output: rows.append(distance(stage, output)))
    return rows


def _run_graph(
    graph: LoadedGraph, sample: Sample, config: EncoderConfig
) -> dict[str, npt.NDArray[np.floating]]:
    """Stage -> output, of the stages that have a value of their own."""
    values = stage_values(graph.rounded.graph, config)
    wanted, folder = list(values.values()), graph.path.parent
    if graph.path.name == UNIFORM_GRAPH:
        slots = slots_from_batch(sample.pixel_values, sample.grid_thw, config)
        patches = np.asarray(slots.pixel_values, np.float32)
        slotted = Sample(sample.name, patches, slots.grid_thw)
        found = arrays_from_model(graph.rounded, folder, slotted, wanted)
        arrays = [slots.packed(array) for array in found]
    else:
        arrays = arrays_from_model(graph.rounded, folder, sample, wanted)
    shapes = stage_shapes(config, sample.num_patches)
    return {
        stage: array
        for stage, array in zip(values, arrays, strict=True)
        if array.shape == shapes[stage]
    }


def _distance(
    stage: str, output: npt.NDArray[Any], reference: npt.NDArray[np.float64], float_type: str
) -> StageDistance:
    # A maximum that passes NaN by: what is finite has a magnitude still.
    largest = float(np.fmax.reduce(np.abs(output), axis=None))
    headroom = PRECISIONS[float_type].largest / largest if largest else float("inf")
    return StageDistance(stage, metrics(output, reference), largest, headroom)
