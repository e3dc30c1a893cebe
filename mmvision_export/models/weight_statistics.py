"""What an encoder's weights say about the number formats they fit."""

from __future__ import annotations

from typing import Any

import torch

from mmvision_export.core.errors import ExportError
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule

__all__ = ["weight_statistics"]

_FLOAT16_MAX = torch.finfo(torch.float16).max
# Half of the smallest subnormal float16: what is not larger rounds to zero.
_FLOAT16_ZERO = 2.0**-25


def weight_statistics(encoder: VisionEncoderModule) -> dict[str, Any]:
    """The largest weight, and what float16 would lose, for a manifest.

    Args:
        encoder: In the type it is exported in.

    Returns:
        `largest`: name and magnitude; `beyond_float16`: names of weights with values that float16
        cannot hold; `zero_in_float16`: how many values other than zero it would make zero.

    Raises:
        ExportError: Weights are not finite, because the encoder's type cannot hold them; names them
            all.
    """
    largest, beyond, zeros, not_finite = ("", 0.0), [], 0, []
    for name, weight in encoder.named_parameters():
        low, high = (float(x) for x in torch.aminmax(weight))
        magnitude = max(-low, high)
        if not magnitude < float("inf"):
            not_finite.append(name)
        if magnitude > _FLOAT16_MAX:
            beyond.append(name)
        largest = max(largest, (name, magnitude), key=lambda pair: pair[1])
        if weight.dtype != torch.float16:
            zeros += int(((weight != 0) & (weight.abs() <= _FLOAT16_ZERO)).sum())
    if not_finite:
        kind = str(next(encoder.parameters()).dtype).removeprefix("torch.")
        raise ExportError(
            f"weights outside the range of {kind}: {', '.join(not_finite)}",
            hint="export with --bf16, whose range is float32's",
        )
    return {
        "largest": {"name": largest[0], "magnitude": largest[1]},
        "beyond_float16": beyond,
        "zero_in_float16": zeros,
    }
