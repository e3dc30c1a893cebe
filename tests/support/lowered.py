"""Graphs as a TensorRT's parser gets them, to run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import onnxruntime


def session_of(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    """A model whose weights lie in a folder, in ONNX Runtime as it is written: nothing is fused."""
    path = folder / "lowered.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()


def run_model(model: ir.Model, folder: Path, **feeds: Any) -> list[np.ndarray]:
    """The outputs of a model."""
    outputs: list[np.ndarray] = session_of(model, folder).run(None, feeds)
    return outputs


def run_as_written(model: ir.Model, folder: Path | None = None, **feeds: Any) -> np.ndarray:
    """The first output, each operator in its own type: ONNX Runtime's CPU provider has no float16.

    Args:
        model: A model without external weights, or one whose weights lie in `folder`.
        folder: Where the weights are.
        feeds: The inputs.
    """
    proto = ir.to_proto(model)
    if folder is not None:
        onnx.load_external_data_for_model(proto, str(folder))
    with np.errstate(all="ignore"):
        outputs: Any = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    result: np.ndarray = outputs[0]
    return result


def model_from_text(text: str) -> ir.Model:
    """A model in ONNX's textual syntax, with the types that can be inferred."""
    proto = onnx.parser.parse_model(text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))
