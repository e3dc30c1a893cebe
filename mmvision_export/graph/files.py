"""ONNX files on disk: writing a graph with its weights beside it.

Needs onnx but not torch: a machine that only builds engines runs this too.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from mmvision_export.artifacts.manifest import CPU_GRAPH, GRAPH, UNIFORM_GRAPH
from mmvision_export.core.errors import ExportError
from mmvision_export.core.progress import Progress
from mmvision_export.graph.cpu.flavour import cpu_graph_from_portable
from mmvision_export.graph.uniform import uniform_graph_from_portable
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["save_cpu_graph", "save_graph", "save_uniform_graph"]


def save_graph(
    model: ir.Model, directory: Path, name: str, progress: Progress | None = None
) -> None:
    """Write a graph, its weights beside it in `<name>.data`, and check the file.

    Raises:
        ExportError: The written file is not a valid ONNX model.
    """
    progress = progress or Progress()
    total = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    progress.step(f"writing {name}", total=total)

    def advance(tensor: ir.TensorProtocol, _: object) -> None:
        progress.advance(tensor.nbytes)

    # Large tensors start at a page, so that a runtime can map them; none is small enough to move
    # into the graph's file but the constants of shape arithmetic.
    ir.save(model, directory / name, external_data=f"{name}.data", alignment=4096, callback=advance)
    progress.step(f"checking {name}")
    _check(directory / name)


def save_cpu_graph(directory: Path, config: EncoderConfig) -> None:
    """Write the CPU flavour beside a float32 portable graph, whose weights it shares.

    Raises:
        ExportError: See `cpu_graph_from_portable`; or the written file is not a valid ONNX model.
    """
    model = cpu_graph_from_portable(directory / GRAPH, config)
    content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (directory / CPU_GRAPH).write_bytes(content)
    _check(directory / CPU_GRAPH)


def save_uniform_graph(directory: Path) -> None:
    """Write the uniform flavour beside a float32 portable graph, and check it.

    Raises:
        ExportError: See `uniform_graph_from_portable`; or the file is not a valid ONNX model.
    """
    model = uniform_graph_from_portable(directory / GRAPH)
    content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (directory / UNIFORM_GRAPH).write_bytes(content)
    _check(directory / UNIFORM_GRAPH)


def _check(graph: Path) -> None:
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name} is not a valid ONNX model: {error}") from error
