"""Engine files with sidecars, for what does not open them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.build_target import TensorRTVersion
from mmvision_export.artifacts.engine_record import (
    EngineAttention,
    EngineRecord,
    GraphRecord,
    sidecar_path,
)
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.files import file_record
from mmvision_export.core.trust import record_built
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

ENGINE = "tensorrt-rtx-1.7.1.116-sm89-fp16.engine"


def write_engine(folder: Path, **changes: Any) -> Path:
    """Some bytes with a sidecar that fits them, as if this user had built them."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / ENGINE
    engine.write_bytes(b"executable content")
    record = EngineRecord(
        backend="tensorrt-rtx",
        tensorrt_version=TensorRTVersion("1.7.1.116"),
        compute_capabilities=(ComputeCapability(8, 6), ComputeCapability(8, 9)),
        platform="linux-x86_64",
        precision="fp16",
        attention=EngineAttention(way="native", body="attention", fused=True),
        profiles=(Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8),),
        graph=GraphRecord(name="model.onnx", sha256="0" * 64, data_sha256="1" * 64),
        engine=file_record(engine),
        config=EncoderConfig(),
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
    record = dataclasses.replace(record, **changes)
    record.write(sidecar_path(engine))
    assert record_built(record.engine.sha256, engine) is None
    return engine
