"""What an engine says of its tensors, compared with what its sidecar says.

Buffers are made from the sidecar. The engine writes by its own shapes and types: where the two
differ it would write past a buffer, on the device, without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import ManifestError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["refuse_other_tensors"]


def refuse_other_tensors(
    path: Path,
    engine: trt.ICudaEngine,
    *,
    config: EncoderConfig,
    dtype: np.dtype[Any],
    profiles: Sequence[Profile],
) -> None:
    """Refuse an engine whose tensors are not those that its sidecar describes.

    Args:
        path: The engine file.
        engine: Deserialised.
        config: The sidecar's dimensions.
        dtype: Of `pixel_values` and `image_embeds`, by the sidecar's precision.
        profiles: The sidecar's.

    Raises:
        ManifestError: Names what differs, with both values.
    """
    _compare(path, "optimization profiles", engine.num_optimization_profiles, len(profiles))
    expected = {
        "pixel_values": (config.patch_dim, dtype.itemsize),
        "grid_thw": (3, np.dtype(np.int64).itemsize),
        "image_embeds": (config.text_hidden_size, dtype.itemsize),
    }
    for name, (width, itemsize) in expected.items():
        shape = tuple(engine.get_tensor_shape(name))
        _compare(path, f"{name}, dimensions", len(shape), 2)
        _compare(path, f"{name}, width", shape[1], width)
        _compare(
            path, f"{name}, bytes of a value", engine.get_tensor_dtype(name).itemsize, itemsize
        )
    for index, profile in enumerate(profiles):
        for name, shapes in profile.input_shapes(config.patch_dim).items():
            built = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)]
            # The size that kernels were chosen for, in between, is no limit.
            _compare(path, f"{name} of profile {index}, least", built[0], shapes[0])
            _compare(path, f"{name} of profile {index}, most", built[-1], shapes[-1])


def _compare(path: Path, what: str, built: object, said: object) -> None:
    if built != said:
        raise ManifestError(
            f"{path}: {what}: the engine has {built}, its record says {said}",
            hint="the record was changed, or belongs to another engine: build the engine again",
        )
