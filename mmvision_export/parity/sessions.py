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

__all__ = ["run_model", "session_from_model"]


def session_from_model(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU of a model whose weights lie in files of `folder`, which are not copied.

    Raises:
        BackendError: ONNX Runtime is not installed, or cannot load the model.
    """
    content = ir.serde.serialize_model(model).SerializeToString()
    return create_session(content, provider=PROVIDERS["onnxruntime-cpu"], weights_in=folder)


def run_model(
    model: ir.Model, folder: Path, sample: Sample, outputs: Sequence[str]
) -> list[npt.NDArray[np.floating]]:
    """The named outputs of a model on a sample, its input converted to the model's float type.

    Raises:
        BackendError: ONNX Runtime cannot load or run the model.
    """
    session = session_from_model(model, folder)
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    feeds = {"pixel_values": sample.pixel_values.astype(dtype), "grid_thw": sample.grid_thw}
    try:
        results: list[npt.NDArray[np.floating]] = session.run(list(outputs), feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BackendError(f"ONNX Runtime failed: {error}") from error
    return results
