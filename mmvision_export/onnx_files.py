"""ONNX files on disk: writing a graph with its weights beside it, and the float16 graph of a float32 model directory.

Needs onnx but not torch: a machine that only builds engines runs this too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mmvision_export.backends.onnxruntime import PROVIDERS, create_session, require_provider
from mmvision_export.config import EncoderConfig
from mmvision_export.errors import BackendError, ExportError
from mmvision_export.manifest import CPU_GRAPH, DATA, GRAPH, Manifest, file_record
from mmvision_export.metrics import metrics
from mmvision_export.onnx_cpu import cpu_graph_from_portable
from mmvision_export.onnx_passes import retype
from mmvision_export.output import new_files
from mmvision_export.progress import Progress
from mmvision_export.sample_batches import CHECK_GRIDS, sample_batch

__all__ = ["FP16_GRAPH", "check_against", "derive_fp16", "save_cpu_graph", "save_graph"]

FP16_GRAPH = "model.fp16.onnx"
"""The float16 graph that `derive_fp16` adds to a float32 model directory, with weights of its own."""

FP16_MIN_COSINE = 0.999
"""Gate for every token of a float16 graph, against a more precise one."""

_CPU = PROVIDERS["onnxruntime-cpu"]


def save_graph(model: ir.Model, directory: Path, name: str, progress: Progress | None = None) -> None:
    """Write a graph, its weights beside it in `<name>.data`, and check the file.

    Raises:
        ExportError: The written file is not a valid ONNX model.
    """
    progress = progress or Progress()
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    progress.step(f"writing {name}", total=total)

    def advance(tensor: ir.TensorProtocol, _: object) -> None:
        progress.advance(tensor.nbytes)

    # Large tensors start at a page, so that a runtime can map them; none is small enough to move into the graph's file
    # but the constants of shape arithmetic.
    ir.save(model, directory / name, external_data=f"{name}.data", alignment=4096, callback=advance)
    progress.step(f"checking {name}")
    _check(directory / name)


def save_cpu_graph(directory: Path, config: EncoderConfig) -> None:
    """Write the CPU flavour beside a float32 portable graph, whose weight file it shares, and check it.

    Raises:
        ExportError: See `cpu_graph_from_portable`; or the written file is not a valid ONNX model.
    """
    model = cpu_graph_from_portable(directory / GRAPH, config)
    (directory / CPU_GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    _check(directory / CPU_GRAPH)


def _check(graph: Path) -> None:
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name} is not a valid ONNX model: {error}") from error


def derive_fp16(directory: Path, manifest: Manifest, *, check: bool = True, progress: Progress | None = None) -> str:
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
    model = ir.load(directory / GRAPH)
    retype(model, ir.DataType.FLOAT16)
    with new_files(directory, name=FP16_GRAPH) as new:
        save_graph(model, new, FP16_GRAPH, progress)
        if check:
            check_against(new / FP16_GRAPH, reference=directory / GRAPH, config=manifest.config, progress=progress)
        records = {name: file_record(new / name) for name in names}
    manifest.update(directory, files=records)
    return FP16_GRAPH


def _require_onnxruntime() -> None:
    try:
        require_provider(_CPU)
    except BackendError as error:
        hint = f"{error.hint}; or leave the comparison out with --no-check"
        raise BackendError(f"{FP16_GRAPH} cannot be compared: {error}", hint=hint) from error


def check_against(derived: Path, *, reference: Path, config: EncoderConfig, progress: Progress | None = None) -> None:
    """Compare a derived float16 graph with the one it was derived from, on small batches in ONNX Runtime.

    Finds what a wrong derivation or an overflow does; the full comparison, with PyTorch, is `mmvision parity`.

    Raises:
        BackendError: ONNX Runtime is not installed, or cannot run a graph.
        ExportError: An output is not finite, or a token's cosine similarity is below 0.999.
    """
    progress = progress or Progress()
    progress.step(f"comparing {derived.name} with {reference.name}")
    batches = [sample_batch(grid, config, seed=0) for grid in CHECK_GRIDS.values()]

    def results(graph: Path, dtype: type[np.floating]) -> list[np.ndarray]:
        # One session at a time: two would hold the weights twice.
        session = create_session(graph, provider=_CPU)
        return [session.run(None, {"pixel_values": x.astype(dtype), "grid_thw": grid})[0] for x, grid in batches]

    compared = zip(CHECK_GRIDS, results(derived, np.float16), results(reference, np.float32), strict=True)
    for grid, got, wanted in compared:
        distance = metrics(got, wanted)
        if distance.non_finite or not distance.min_cosine >= FP16_MIN_COSINE:
            raise ExportError(
                f"{derived.name} does not match {reference.name} for {grid}: {distance.non_finite} values not finite, "
                f"minimum cosine {distance.min_cosine:.6f} (gate {FP16_MIN_COSINE})",
                hint="export with --bf16, or build without --fp16",
            )
