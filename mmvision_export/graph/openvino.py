"""The OpenVINO flavour of the graph, `model.openvino.onnx`: the portable one, functions inlined.

OpenVINO's ONNX reader knows no model-local functions, by which the portable graph defines its
operators. Nor does it know the sequences and `com.microsoft::RotaryEmbedding` of the CPU flavour.
It fuses the inlined attention of each layer into one kernel by itself.

Attention is masked, as in the portable graph: its work grows with the square of what runs at once.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmvision_export.core.errors import ExportError
from mmvision_export.graph.passes import inline_functions
from mmvision_export.ops.domain import DOMAIN

__all__ = ["openvino_graph_from_portable"]


def openvino_graph_from_portable(path: Path) -> ir.Model:
    """The OpenVINO flavour of a portable float32 graph, with references into the same weight file.

    Args:
        path: The portable graph, `model.onnx`; its weights are not read.

    Returns:
        A model of ONNX's own operators, with the portable one's inputs and outputs. Save it in
        the same directory.

    Raises:
        ExportError: The graph is not float32, or has no definition of an operator of ours.
    """
    model = ir.load(path)
    if (kind := model.graph.inputs[0].dtype) != ir.DataType.FLOAT:
        raise ExportError(
            f"only a float32 graph has an OpenVINO flavour, {path.name} takes {str(kind).lower()}"
        )
    inline_functions(model)
    if undefined := sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        raise ExportError(f"{path} defines no {' and no '.join(undefined)}")
    model.graph.name = "openvino"
    return model
