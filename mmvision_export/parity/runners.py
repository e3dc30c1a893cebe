"""Polygraphy runners for what its own do not run.

The PyTorch encoder, a graph for images in slots, and an engine as it is deployed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.profile import Profile
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import EncoderLayer, VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.slots import slots_from_batch
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = [
    "BackendRunner",
    "EngineRunner",
    "SlotRunner",
    "TorchRunner",
    "accepts",
    "input_metadata",
]


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """The PyTorch encoder as a Polygraphy runner.

    Its weights are in memory only while it is active.

    Attributes:
        num_layers: Calls of `on_layer` for each batch.
        on_layer: Called when a transformer layer is done.
    """

    def __init__(
        self, name: str, load: Callable[[], VisionEncoderModule], config: EncoderConfig
    ) -> None:
        super().__init__(name=name)
        self._load = load
        self._config = config
        self.num_layers = config.num_hidden_layers
        self.on_layer: Callable[[], object] = lambda: None

    def activate_impl(self) -> None:
        self._encoder = self._load()
        for module in self._encoder.modules():
            if isinstance(module, EncoderLayer):
                module.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.on_layer()

    def deactivate_impl(self) -> None:
        del self._encoder

    def get_input_metadata_impl(self) -> TensorMetadata:
        return input_metadata(self._config)

    def infer_impl(
        self, feed_dict: Mapping[str, npt.NDArray[Any]]
    ) -> OrderedDict[str, npt.NDArray[Any]]:
        pixel_values = torch.from_numpy(feed_dict["pixel_values"]).to(self._encoder.dtype)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._encoder(pixel_values, torch.from_numpy(feed_dict["grid_thw"]))
        self.inference_time = time.perf_counter() - start
        return OrderedDict(
            image_embeds=(out.float() if out.dtype == torch.bfloat16 else out).numpy()
        )


class SlotRunner(BaseRunner):  # type: ignore[misc]
    """A graph for images in slots, in ONNX Runtime, on packed batches.

    Each batch is one launch, whose slots are as long as its largest image.
    """

    def __init__(self, name: str, load: Callable[[], Any], config: EncoderConfig) -> None:
        super().__init__(name=name)
        self._load = load
        self._config = config

    def activate_impl(self) -> None:
        self._session = self._load()

    def deactivate_impl(self) -> None:
        del self._session

    def get_input_metadata_impl(self) -> TensorMetadata:
        return input_metadata(self._config)

    def infer_impl(
        self, feed_dict: Mapping[str, npt.NDArray[Any]]
    ) -> OrderedDict[str, npt.NDArray[Any]]:
        start = time.perf_counter()
        slots = slots_from_batch(feed_dict["pixel_values"], feed_dict["grid_thw"], self._config)
        feeds = {"pixel_values": slots.pixel_values, "grid_thw": slots.grid_thw}
        (out,) = self._session.run(None, feeds)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(image_embeds=slots.packed(out))


class BackendRunner(BaseRunner):  # type: ignore[misc]
    """A model as it is deployed, through a backend of `VisionEncoder`, as a Polygraphy runner."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        backend: str,
        config: EncoderConfig,
        trust: bool | None = None,
    ) -> None:
        super().__init__(name=name)
        self._trust = trust
        self._path = path
        self._backend_name = backend
        self._config = config

    def activate_impl(self) -> None:
        self._encoder = VisionEncoder.open(
            self._path, backend=self._backend_name, trust=self._trust, refuse_non_finite=False
        )

    def deactivate_impl(self) -> None:
        self._encoder.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return input_metadata(self._config)

    def infer_impl(
        self, feed_dict: Mapping[str, npt.NDArray[Any]]
    ) -> OrderedDict[str, npt.NDArray[Any]]:
        start = time.perf_counter()
        out = self._encoder(feed_dict["pixel_values"], feed_dict["grid_thw"])
        self.inference_time = time.perf_counter() - start
        return OrderedDict(image_embeds=out)


class EngineRunner(BackendRunner):
    """An engine, with the sizes that it takes."""

    def __init__(self, name: str, engine: Path, record: EngineRecord, *, trust: bool) -> None:
        super().__init__(name, engine, backend=record.backend, config=record.config, trust=trust)
        self.profiles: Sequence[Profile] = record.profiles
        self.rows_per_slot = record.attention.rows_per_slot


def input_metadata(config: EncoderConfig) -> TensorMetadata:
    """The graph's inputs as Polygraphy describes them.

    Every runner is fed float32 and converts it itself.
    """
    result = TensorMetadata()
    result.add("pixel_values", dtype=DataType.FLOAT32, shape=(None, config.patch_dim))
    result.add("grid_thw", dtype=DataType.INT64, shape=(None, 3))
    return result


def accepts(runner: BaseRunner, patches_per_image: Sequence[int]) -> bool:
    """Whether a runner takes images of these sizes.

    In one launch if it has profiles, or in as many as there need be if those are slots.
    """
    profiles: Sequence[Profile] | None = getattr(runner, "profiles", None)
    if profiles is None:
        return True
    rows: int | None = getattr(runner, "rows_per_slot", None)
    if rows is None:
        total, count = sum(patches_per_image), len(patches_per_image)
        return any(profile.takes(total, count) for profile in profiles)
    lengths = {p.max_patches * rows // p.max_images for p in profiles}
    if rows == 1:  # where every image fills its slot
        return lengths.issuperset(patches_per_image)
    return max(patches_per_image) <= max(lengths)
