"""An engine that was built here, opened as it is deployed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = [
    "BuiltEngine",
    "Opener",
    "arrays_on_device",
    "encoder_from_backend",
    "filling_batch",
    "open_engine",
    "random_batch",
    "same_bits",
]

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

    @property
    def largest(self) -> Profile:
        """Its profile for the largest image."""
        return max(self.record.profiles, key=lambda profile: profile.image_patches)


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
    backend: TensorRTBackend, profile: Profile, *, seed: int
) -> tuple[npt.NDArray[np.float32], PackedBatch]:
    """Random patches that fill a launch: one image, or one in each slot. See `random_batch`."""
    return random_batch(backend, [profile.image_patches] * (profile.slots or 1), seed=seed)


def random_batch(
    backend: TensorRTBackend, patches_per_image: Sequence[int], *, seed: int
) -> tuple[npt.NDArray[np.float32], PackedBatch]:
    """Images of random patches.

    Args:
        backend: Gives the dimensions.
        patches_per_image: Whole merge blocks each.
        seed: Of the patches.

    Returns:
        pixel_values `[num_patches, patch_dim]` float32, and the batch in the engine's type.
    """
    merge = backend.config.spatial_merge_size
    grid = [(1, merge, patches // merge) for patches in patches_per_image]
    pixels, rows = batch_of_grid(grid, patch_dim=backend.config.patch_dim, seed=seed)
    packed = PackedGrid(rows, backend.config.patches_per_token)
    return pixels, PackedBatch(pixels, packed).of_type(backend.dtype)


@contextlib.contextmanager
def arrays_on_device(
    backend: TensorRTBackend, cuda: Cuda, profile: Profile
) -> Iterator[tuple[PackedBatch, DeviceArray, int]]:
    """Patches and room for the embeddings on the device, and a stream, freed at the end.

    Yields:
        The batch that fills the profile, its patches on the device; room for image_embeds
        `[num_image_tokens, text_hidden_size]`; the stream's handle.
    """
    cuda.use()
    with contextlib.ExitStack() as freed:
        stream = cuda.new_stream()
        freed.callback(cuda.free_stream, stream)
        _, batch = filling_batch(backend, profile, seed=0)
        host = np.ascontiguousarray(batch.pixel_values)
        shapes = (host.shape, (batch.grid.num_tokens, backend.config.text_hidden_size))
        arrays = []
        for shape in shapes:
            address = cuda.allocate(int(np.prod(shape)) * backend.dtype.itemsize)
            freed.callback(cuda.free, address)
            arrays.append(DeviceArray(address, shape, backend.dtype, cuda.device, None))
        source, target = arrays
        cuda.to_device(source.address, host, stream)
        cuda.synchronize(stream)
        freed.callback(cuda.synchronize, stream)
        yield PackedBatch(source, batch.grid), target, stream


def same_bits(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> bool:
    """Whether two arrays are equal as bytes, in which NaN equals itself and -0 does not equal 0."""
    bits_a, bits_b = (np.ascontiguousarray(x).view(np.uint8) for x in (a, b))
    return np.array_equal(bits_a, bits_b)
