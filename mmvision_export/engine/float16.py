"""The float16 graph of a float32 model directory, which engines are built from.

Needs onnx but not torch: a machine that only builds engines runs this too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmvision_export.artifacts.manifest import DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import BackendError, ExportError
from mmvision_export.core.files import file_record
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.graph.files import save_graph
from mmvision_export.graph.load import load_graph
from mmvision_export.graph.passes import retype
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.sample_batches import CHECK_GRIDS, sample_batch
from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, create_session, require_provider

__all__ = ["FP16_GRAPH", "check_against", "derive_fp16"]

FP16_GRAPH = flavour_graph("fp16")
"""The graph that `derive_fp16` adds to a float32 model directory, with weights of its own."""

_CPU = PROVIDERS["onnxruntime-cpu"]


def derive_fp16(
    directory: Path, manifest: Manifest, *, check: bool = True, progress: Progress | None = None
) -> str:
    """Write the float16 graph of a float32 model directory, unless it is there already.

    Args:
        directory: The model directory.
        manifest: Its manifest; it then lists the new files, in memory and on disk.
        check: Compare the new graph with the float32 one before keeping it, see `check_against`.
        progress: Told about each step.

    Returns:
        The graph's file name in the directory.

    Raises:
        ManifestError: Files of the directory are missing or not those of the manifest.
        ExportError: A weight is not finite in float16, or the new graph does not compute the same.
        BackendError: The check needs ONNX Runtime, which is not installed.
        OutputError: The files cannot be written.
    """
    names = (FP16_GRAPH, f"{FP16_GRAPH}.data")
    if all(name in manifest.files for name in names):
        manifest.verify(directory, names)
        return FP16_GRAPH
    progress = progress or Progress()
    if check:
        _require_onnxruntime()
    manifest.verify(directory, (GRAPH, DATA))
    model = load_graph(directory / GRAPH)
    retype(model, ir.DataType.FLOAT16)
    with new_files(directory, name=FP16_GRAPH) as new:
        save_graph(model, new, FP16_GRAPH, progress)
        if check:
            check_against(
                new / FP16_GRAPH,
                reference=directory / GRAPH,
                config=manifest.config,
                progress=progress,
            )
        records = {name: file_record(new / name) for name in names}
    manifest.update(directory, files=records)
    return FP16_GRAPH


def _require_onnxruntime() -> None:
    try:
        require_provider(_CPU)
    except BackendError as error:
        hint = f"{error.hint}; or leave the comparison out with --no-check"
        raise BackendError(f"{FP16_GRAPH} cannot be compared: {error}", hint=hint) from error


def check_against(
    derived: Path, *, reference: Path, config: EncoderConfig, progress: Progress | None = None
) -> None:
    """Compare a derived float16 graph with the one it was derived from.

    On small batches, in ONNX Runtime. Finds what a wrong derivation or an overflow does; the full
    comparison, with PyTorch, is `mmvision parity`.

    Raises:
        BackendError: ONNX Runtime is not installed, or cannot run a graph.
        ExportError: An output is not finite, or a token's cosine similarity is below the gate.
    """
    progress = progress or Progress()
    progress.step(f"comparing {derived.name} with {reference.name}")
    gate = PRECISIONS["fp16"].gate.min_cosine
    batches = [sample_batch(grid, config, seed=0) for grid in CHECK_GRIDS.values()]

    def results(graph: Path, dtype: type[np.floating]) -> list[np.ndarray]:
        # One session at a time: two would hold the weights twice.
        session = create_session(graph, provider=_CPU)
        return [
            session.run(None, {"pixel_values": x.astype(dtype), "grid_thw": grid})[0]
            for x, grid in batches
        ]

    compared = zip(
        CHECK_GRIDS, results(derived, np.float16), results(reference, np.float32), strict=True
    )
    for grid, got, wanted in compared:
        distance = metrics(got, wanted)
        if distance.non_finite or not distance.min_cosine >= gate:
            raise ExportError(
                f"{derived.name} does not match {reference.name} for {grid}: "
                f"{distance.non_finite} values not finite, "
                f"minimum cosine {distance.min_cosine:.6f} (gate {gate})",
                hint="export with --bf16, or build without --fp16",
            )
