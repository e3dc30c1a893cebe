"""The model that Triton's Python backend runs: see `answers` for what it does with requests.

The server's own module `triton_python_backend_utils` is there only in its process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.core.errors import BackendError, InputError, MmvisionError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.runtime.vision_encoder import VisionEncoder
from mmvision_export.triton_server.answers import (
    Answer,
    Request,
    answers_by_call,
    request_from_arrays,
    warm_up,
)
from mmvision_export.triton_server.config import MODEL_FOLDER

__all__ = ["TritonPythonModel"]

_COUNTED = np.arange(6, dtype=np.int64).reshape(2, 3)


class TritonPythonModel:
    """What Triton calls, by these names."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the encoder.

        Args:
            args: Triton's: the model's folder, its version, its configuration as JSON, the instance's
                device.

        Raises:
            MmvisionError: It does not open here, and the server says so.
        """
        import triton_python_backend_utils as utils

        self._utils = utils
        _refuse_other_numpy(utils)
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        directory = Path(args["model_repository"], args["model_version"], MODEL_FOLDER)
        on_gpu = args["model_instance_kind"] == "GPU"
        self._encoder = VisionEncoder.open(
            directory / given["engine"] if given["engine"] else directory,
            backend=given["backend"],
            threads=int(given["threads"]) or None,
            device=int(args["model_instance_device_id"]) if on_gpu else 0,
            # The engine was named when the repository was made.
            trust=True if given["engine"] else None,
        )
        preprocessor = self._encoder.preprocessor_for(
            resize_to_fit=given["resize_to_fit"] == "true"
        )
        self._decoder = ImageDecoder(preprocessor, max_pixels=int(given["max_pixels"]))
        self._refuse_other_type(config, directory)
        warm_up(self._encoder, json.loads(given["warm_up"]))

    def _refuse_other_type(self, config: Mapping[str, Any], directory: Path) -> None:
        (declared,) = (o["data_type"] for o in config["output"] if o["name"] == "image_embeds")
        if self._utils.triton_string_to_numpy(declared) != self._encoder.dtype:
            raise InputError(
                f"{directory} gives {self._encoder.dtype}, config.pbtxt declares {declared}",
                hint="make the repository again with: mmvision triton-repository",
            )

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer what the server's batcher has gathered, each request when its call is done."""
        senders = [request.get_response_sender() for request in requests]
        good: list[Request] = []
        numbers: list[int] = []
        for number, request in enumerate(requests):
            try:
                good.append(
                    request_from_arrays(
                        *(
                            self._array(request, name)
                            for name in ("image", "pixel_values", "grid_thw")
                        )
                    )
                )
                numbers.append(number)
            except MmvisionError as error:
                self._send(senders[number], error)
        for answered in answers_by_call(self._encoder, self._decoder, good):
            for index, answer in answered:
                self._send(senders[numbers[index]], answer)

    def finalize(self) -> None:
        """Close the encoder."""
        self._encoder.close()

    def _array(self, request: Any, name: str) -> Any:
        tensor = self._utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def _send(self, sender: Any, answer: Answer | MmvisionError) -> None:
        utils = self._utils
        if isinstance(answer, MmvisionError):
            hint = f"; {answer.hint}" if answer.hint else ""
            kind = (
                utils.TritonError.INVALID_ARG
                if isinstance(answer, InputError)
                else utils.TritonError.INTERNAL
            )
            response = utils.InferenceResponse(
                error=utils.TritonError(f"{answer.message}{hint}", kind)
            )
        else:
            arrays = {
                "image_embeds": answer.image_embeds,
                "image_grid_thw": answer.grid_thw,
                "tokens_per_image": answer.tokens_per_image,
            }
            response = utils.InferenceResponse(
                [utils.Tensor(name, array[None]) for name, array in arrays.items()]
            )
        sender.send(response, flags=utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _refuse_other_numpy(utils: Any) -> None:
    """Refuse a NumPy whose arrays the server makes wrongly.

    A Python backend that was compiled for NumPy 1 reads the size of a value from another place than
    NumPy 2 has it, and gives the first value of a tensor for each of them.

    Raises:
        BackendError: It does.
    """
    tensor = utils.Tensor.from_dlpack("counted", utils.Tensor("counted", _COUNTED).to_dlpack())
    if not np.array_equal(tensor.as_numpy(), _COUNTED):
        raise BackendError(
            f"this server's Python backend makes wrong arrays with NumPy {np.__version__}",
            hint="install numpy<2 where the server's Python imports from",
        )
