"""A machine with the stand-ins for TensorRT and the CUDA driver, and one engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.engine_record import EngineAttention
from mmvision_export.artifacts.profile import Profile
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.runtime.backends.tensorrt_rtx import TensorRTRTXBackend
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import HEAD_DIM_80
from tests.support.engines import write_engine
from tests.support.fake_driver import FakeDriver
from tests.support.fake_gpu import TensorRT

KINDS: dict[str, type[TensorRTBackend]] = {
    "tensorrt": TensorRTBackend,
    "tensorrt-rtx": TensorRTRTXBackend,
}


class Machine:
    """A fake GPU machine with one engine. Its platform must be patched to `linux-x86_64`."""

    def __init__(
        self,
        driver: FakeDriver,
        folder: Path,
        profiles: Sequence[Profile],
        kind: str = "tensorrt",
        attention: EngineAttention | None = None,
    ) -> None:
        self.kind = kind
        self.driver = driver
        limits = [
            {
                "pixel_values": (p.min_patches, p.max_patches),
                "grid_thw": (p.min_images, p.max_images),
            }
            for p in profiles
        ]
        self.trt = TensorRT(driver, HEAD_DIM_80.text_hidden_size, limits)
        changes: dict[str, Any] = {}
        if attention is not None:
            changes["attention"] = attention
            self.trt.rows_per_slot = {"uniform": 2, "equal": 1}.get(attention.way)
        self.engine = write_engine(
            folder, config=HEAD_DIM_80, backend=kind, profiles=tuple(profiles), **changes
        )

    def open(self, **options: Any) -> TensorRTBackend:
        cuda = self.driver.cuda()
        return KINDS[self.kind](
            self.engine, BackendOptions(**options), module=self.trt, cuda=cuda, manifest=None
        )

    def encoder(self, **options: Any) -> VisionEncoder:
        return VisionEncoder(self.open(**options), PreprocessorConfig())

    def holds_nothing(self) -> bool:
        return self.driver.holds_nothing()
