"""A graph written so that a TensorRT's parser makes nothing but typed layers of it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mmvision_export.engine.layer_norm import (
    LayerNormForm,
    float32_layer_norms,
    layer_norm_form_for_parser,
)
from mmvision_export.engine.masked_sum import masked_sums_from_cumsums
from mmvision_export.engine.opset import retarget
from mmvision_export.engine.parser_support import ParserVersion, latest_opset
from mmvision_export.graph.passes import inline_functions

__all__ = ["write_for_parser"]


def write_for_parser(
    model: ir.Model, parser: ParserVersion, *, layer_norms: LayerNormForm | None = None
) -> None:
    """Write a graph in the operators that a parser imports well, and put its definitions in place.

    Args:
        model: A graph with the definitions that shall take their nodes' place; changed in place. A
            node without one, such as a plugin's, stays.
        parser: The TensorRT whose parser it is for.
        layer_norms: How LayerNormalization is written; as suits the parser if None.

    Raises:
        EngineError: The graph holds something that cannot be written for this parser.
    """
    masked_sums_from_cumsums(model)
    float32_layer_norms(model, layer_norms or layer_norm_form_for_parser(parser))
    inline_functions(model)
    ShapeInferencePass()(model)
    retarget(model, latest_opset(parser))
