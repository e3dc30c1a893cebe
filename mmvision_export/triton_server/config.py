"""`config.pbtxt` of the models in a repository.

References:
    https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import InputError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "MODEL_FOLDER",
    "ServerSettings",
    "WarmUp",
    "python_model_config",
    "raw_model_config",
    "warm_ups",
]

MODEL_FOLDER = "model"
"""The model directory in the Python model's version."""

TritonType = Literal["TYPE_FP32", "TYPE_FP16"]

_TRITON_TYPES: dict[str, TritonType] = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
# Of a graph that takes any size: a small image, and as many patches as are worth one call.
_GRAPH_SIZES = (256, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a user chooses of the server's model.

    Attributes:
        backend: Of `VisionEncoder`.
        threads: Of a CPU backend, each instance; None for its own choice.
        instances: Encoders at once, each with a copy of the weights; on a GPU, on each GPU.
        max_delay_ms: How long a request may wait for others.
        max_requests: Most requests that are gathered.
        resize_to_fit: Shrink an image that is too large for the engine.
        max_pixels: Most pixels of an image.

    Raises:
        InputError: A number is out of range.
    """

    backend: str
    threads: int | None
    instances: int
    max_delay_ms: float
    max_requests: int
    resize_to_fit: bool
    max_pixels: int

    def __post_init__(self) -> None:
        for name in ("instances", "max_requests", "max_pixels", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.max_delay_ms <= 60_000:
            raise InputError(f"max_delay_ms must be between 0 and 60000, got {self.max_delay_ms}")


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """One call that an instance makes before the server is ready.

    The model makes it itself: `model_warmup` of the configuration would need a file for each grid.

    Attributes:
        rows: Grid rows (t, h, w) of its images.
    """

    rows: tuple[tuple[int, int, int], ...]

    @property
    def num_patches(self) -> int:
        """Patches, all images together."""
        return sum(t * h * w for t, h, w in self.rows)


def warm_ups(profiles: Sequence[Profile], config: EncoderConfig) -> list[WarmUp]:
    """One for each bucket of an engine, or two sizes of a graph that takes any."""
    sizes = [(p.image_patches, p.slots or 1) for p in profiles] or [(n, 1) for n in _GRAPH_SIZES]
    return [
        WarmUp((_grid_of(patches, config),) * images) for patches, images in dict.fromkeys(sizes)
    ]


def _grid_of(patches: int, config: EncoderConfig) -> tuple[int, int, int]:
    """The grid of so many patches that is nearest to a square."""
    merge = config.spatial_merge_size
    blocks = patches // config.patches_per_token
    rows = max(n for n in range(1, int(blocks**0.5) + 1) if blocks % n == 0)
    return 1, rows * merge, blocks // rows * merge


def python_model_config(
    name: str,
    config: EncoderConfig,
    *,
    io_dtype: str,
    engine: str,
    on_gpu: bool,
    settings: ServerSettings,
    warm: Sequence[WarmUp],
) -> str:
    """Of the model that takes images or patches.

    Args:
        name: Of the model.
        config: The encoder's dimensions.
        io_dtype: NumPy name of the type of the embeddings.
        engine: Path of the engine below the model directory; empty for a graph.
        on_gpu: Whether instances are on GPUs.
        settings: The user's choices.
        warm: What the server runs before it is ready.
    """
    parameters = {
        "backend": settings.backend,
        "engine": engine,
        "threads": str(settings.threads or 0),
        "resize_to_fit": str(settings.resize_to_fit).lower(),
        "max_pixels": str(settings.max_pixels),
        "warm_up": json.dumps([each.rows for each in warm]),
    }
    inputs = [
        _tensor("image", "TYPE_STRING", [-1], optional=True),
        _tensor("pixel_values", "TYPE_FP32", [-1, config.patch_dim], optional=True),
        _tensor("grid_thw", "TYPE_INT64", [-1, 3], optional=True),
    ]
    outputs = [
        _tensor("image_embeds", _TRITON_TYPES[io_dtype], [-1, config.text_hidden_size]),
        _tensor("image_grid_thw", "TYPE_INT64", [-1, 3]),
        _tensor("tokens_per_image", "TYPE_INT64", [-1]),
    ]
    # Requests differ in their inputs and shapes; each has a leading dimension of 1, which is what
    # the server's batcher counts.
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {settings.max_requests}",
        f"input [\n{_listed(inputs)}\n]",
        f"output [\n{_listed(outputs)}\n]",
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {round(settings.max_delay_ms * 1000)}",
        "}",
        _instances(settings.instances, on_gpu=on_gpu),
        *(_parameter(key, value) for key, value in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def raw_model_config(
    name: str,
    config: EncoderConfig,
    *,
    platform: Literal["onnxruntime_onnx", "tensorrt_plan"],
    file: str,
    io_dtype: str,
    num_profiles: int,
    on_gpu: bool,
) -> str:
    """Of the graph or engine as it is, for the server's own backend.

    Args:
        name: Of the model.
        config: The encoder's dimensions.
        platform: Triton's name of backend and format.
        file: File name of the graph or engine.
        io_dtype: NumPy name of the type of patches and embeddings.
        num_profiles: Optimization profiles of an engine; 0 of a graph.
        on_gpu: Whether the instance is on GPUs.
    """
    kind = _TRITON_TYPES[io_dtype]
    inputs = [
        _tensor("pixel_values", kind, [-1, config.patch_dim]),
        _tensor("grid_thw", "TYPE_INT64", [-1, 3]),
    ]
    outputs = [_tensor("image_embeds", kind, [-1, config.text_hidden_size])]
    lines = [
        f"name: {_quoted(name)}",
        f"platform: {_quoted(platform)}",
        "max_batch_size: 0",
        f"default_model_filename: {_quoted(file)}",
        f"input [\n{_listed(inputs)}\n]",
        f"output [\n{_listed(outputs)}\n]",
        _instances(1, on_gpu=on_gpu, profiles=range(num_profiles)),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # A protobuf text string has the escapes of JSON that are used here.
    return json.dumps(text, ensure_ascii=False)


def _listed(entries: Sequence[str]) -> str:
    return ",\n".join(entries)


def _tensor(name: str, kind: str, dims: Sequence[int], *, optional: bool = False) -> str:
    ragged = " optional: true allow_ragged_batch: true" if optional else ""
    return f"  {{ name: {_quoted(name)} data_type: {kind} dims: {list(dims)}{ragged} }}"


def _instances(count: int, *, on_gpu: bool, profiles: Sequence[int] = ()) -> str:
    chosen = f" profile: {json.dumps([str(index) for index in profiles])}" if profiles else ""
    kind = "KIND_GPU" if on_gpu else "KIND_CPU"
    return f"instance_group [ {{ count: {count} kind: {kind}{chosen} }} ]"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
