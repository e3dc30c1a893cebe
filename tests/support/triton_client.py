"""Stands in for `tritonclient.http`: as much as an example calls, answered by the model's own code.

`MMVISION_STAND_IN_REPOSITORY` names the model repository. What the repository does not declare, by
name, type or rank, is refused, as the server refuses it. Nothing is sent anywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import MmvisionError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.triton_server.answers import answers_by_call, request_from_arrays

__all__ = ["InferInput", "InferResult", "InferenceServerClient"]


class InferInput:
    """A tensor of a request."""

    def __init__(self, name: str, shape: list[int], datatype: str) -> None:
        self.name, self.shape, self.datatype = name, shape, datatype
        self.array: np.ndarray | None = None

    def set_data_from_numpy(self, array: np.ndarray) -> None:
        """Its values."""
        assert list(array.shape) == self.shape, (array.shape, self.shape)
        assert (array.dtype == object) == (self.datatype == "BYTES")
        self.array = array


class InferResult:
    """The tensors of an answer."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def as_numpy(self, name: str) -> np.ndarray:
        """One of them."""
        return self._arrays[name]


class InferenceServerClient:
    """Answers in this process."""

    def __init__(self, url: str) -> None:
        assert re.fullmatch(r"[\w.]+:\d+", url), url
        self._repository = Path(os.environ["MMVISION_STAND_IN_REPOSITORY"])

    def infer(self, name: str, inputs: list[InferInput]) -> InferResult:
        """One request."""
        folder = self._repository / name
        config = (folder / "config.pbtxt").read_text()
        arrays: dict[str, Any] = {}
        for each in inputs:
            declared = re.search(
                rf'name: "{each.name}"\s+data_type: TYPE_(\w+)\s+dims: \[([^\]]*)\]', config
            )
            assert declared is not None, f"{each.name} is not in {folder}/config.pbtxt"
            assert declared[1].replace("STRING", "BYTES") == each.datatype
            assert len(each.shape) == 1 + len(declared[2].split(","))  # the request's dimension
            arrays[each.name] = each.array
        request = request_from_arrays(
            *(arrays.get(each) for each in ("image", "pixel_values", "grid_thw"))
        )
        with VisionEncoder.open(folder / "1" / "model", backend="onnxruntime-cpu") as encoder:
            ((found,),) = answers_by_call(encoder, ImageDecoder(encoder.preprocessor), [request])
        answer = found[1]
        if isinstance(answer, MmvisionError):
            raise answer
        return InferResult(
            {
                "image_embeds": answer.image_embeds[None],
                "tokens_per_image": answer.tokens_per_image[None],
                "image_grid_thw": answer.grid_thw[None],
            }
        )

    def close(self) -> None:
        """Nothing is open."""
