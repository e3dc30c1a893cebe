"""ONNX Runtime sessions of graphs that are in memory only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.errors import BackendError
from mmvision_export.parity.samples import Sample
from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, create_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["arrays_from_model", "session_from_model"]


def session_from_model(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU of a model whose weights lie in files of `folder`, which are not copied.

    Raises:
        BackendError: ONNX Runtime is not installed, or cannot load the model.
    """
    content = ir.serde.serialize_model(model).SerializeToString()
    return create_session(content, provider=PROVIDERS["onnxruntime-cpu"], weights_in=folder)


def arrays_from_model(
    model: ir.Model, folder: Path, sample: Sample, values: Sequence[ir.Value]
) -> list[npt.NDArray[np.floating]]:
    """Values of a model on a sample, its input converted to the model's float type.

    Args:
        model: The model; it is given back as it was.
        folder: Where the files of its weights lie.
        sample: The batch.
        values: Of its main graph, whether they are outputs of it or not.

    Raises:
        BackendError: ONNX Runtime cannot load or run the model.
    """
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in values if value not in outputs)
    try:
        session = session_from_model(model, folder)
    finally:
        model.graph.outputs[:] = outputs
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    feeds = {"pixel_values": sample.pixel_values.astype(dtype), "grid_thw": sample.grid_thw}
    try:
        arrays: list[npt.NDArray[np.floating]] = session.run([str(v.name) for v in values], feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BackendError(f"ONNX Runtime failed: {error}") from error
    return arrays
