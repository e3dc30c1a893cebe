"""An engine that was built here, opened as it is deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.profile import Profile
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.models.sample_batches import batch_of_grid
from mmvision_export.runtime.backends import BackendOptions, open_backend
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["BuiltEngine", "Opener", "encoder_from_backend", "filling_batch", "open_engine"]

Opener = Callable[[Path, BackendOptions], TensorRTBackend]
"""Opens an engine; tests open theirs on the stand-ins."""


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine.

    Attributes:
        name: What it was built with and how, as `tensorrt, plugin, buckets`.
        path: Its file; the sidecar is beside it.
        record: The sidecar.
    """

    name: str
    path: Path
    record: EngineRecord

    @property
    def buckets(self) -> list[Profile]:
        """Its profiles of one size."""
        return [profile for profile in self.record.profiles if profile.is_bucket]


def open_engine(path: Path, options: BackendOptions) -> TensorRTBackend:
    """Open an engine with the TensorRT that built it.

    Raises:
        BackendError: See `open_backend`.
        ManifestError: See `open_backend`.
    """
    backend = EngineRecord.read(path).backend
    opened = open_backend(path, dataclasses.replace(options, backend=backend))
    return cast("TensorRTBackend", opened)


def encoder_from_backend(
    backend: TensorRTBackend, *, refuse_non_finite: bool = True
) -> VisionEncoder:
    """An encoder that takes patches; closing it closes the backend."""
    preprocessor = PreprocessorConfig.for_encoder(backend.config)
    return VisionEncoder(backend, preprocessor, refuse_non_finite=refuse_non_finite)


def filling_batch(
    backend: TensorRTBackend, num_patches: int, *, seed: int
) -> tuple[npt.NDArray[np.float32], PackedBatch]:
    """One image of random patches that fills a launch.

    Args:
        backend: Gives the dimensions.
        num_patches: Of the image, whole merge blocks.
        seed: Of the patches.

    Returns:
        pixel_values `[num_patches, patch_dim]` float32, and the batch in the engine's type.
    """
    merge = backend.config.spatial_merge_size
    grid = [(1, merge, num_patches // merge)]
    pixels, rows = batch_of_grid(grid, patch_dim=backend.config.patch_dim, seed=seed)
    packed = PackedGrid(rows, backend.config.patches_per_token)
    return pixels, PackedBatch(pixels, packed).of_type(backend.dtype)
