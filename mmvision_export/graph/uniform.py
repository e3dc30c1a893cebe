"""The uniform flavour of the graph, `model.uniform.onnx`: images in slots of equal length.

It takes batches laid out as `models.minimax_m3_vl.slots` does: two rows of `grid_thw` for each slot, an
image and its padding. Attention is computed slot by slot, so that its work is the number of slots
times the square of their length, where the portable graph masks one product over the whole batch.

Functions are inlined, because OpenVINO's ONNX reader, for which the flavour is there, knows no
model-local functions. Nor does it know the sequences and `com.microsoft::RotaryEmbedding` of the CPU
flavour.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmvision_export.core.errors import ExportError
from mmvision_export.graph.passes import inline_functions
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION

__all__ = ["uniform_graph_from_portable"]

_BODY = "uniform_matmul"


def uniform_graph_from_portable(path: Path) -> ir.Model:
    """The uniform flavour of a portable float32 graph, with references into the same weight file.

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
            f"only a float32 graph has a uniform flavour, {path.name} takes {str(kind).lower()}"
        )
    function = ir.serde.deserialize_function(
        VARLEN_ATTENTION.function(_BODY, model.opset_imports[""])
    )
    model.functions[function.identifier()] = function
    inline_functions(model)
    if undefined := sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        raise ExportError(f"{path} defines no {' and no '.join(undefined)}")
    model.graph.name = "uniform"
    return model
