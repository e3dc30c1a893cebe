"""One image's embeddings in bfloat16, the type that language models take them in.

NumPy has no bfloat16. The values are kept as their 16 bits, so that neither torch nor another
package is needed to make, keep and write them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["ImageEmbeds", "bfloat16_bits_from_floats", "floats_from_bfloat16_bits"]

_QUIET_NAN = 0x7FC0


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEmbeds:
    """What a language model takes in the place of one image's placeholder tokens.

    Attributes:
        bits: `[tokens, text_hidden_size]` uint16, C-contiguous: the bits of bfloat16. Read-only,
            because a cache hands the same array to many callers.
        grid_thw: (t, h, w) in patches.
    """

    bits: npt.NDArray[np.uint16]
    grid_thw: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.bits.ndim != 2 or self.bits.dtype != np.uint16:
            raise InputError(
                "bits must be uint16 of shape [tokens, text_hidden_size], got "
                f"{self.bits.dtype} {list(self.bits.shape)}"
            )
        if not self.bits.flags.c_contiguous:
            raise InputError("bits must be C-contiguous, got a strided view")
        self.bits.setflags(write=False)

    @classmethod
    def of(
        cls, image_embeds: npt.NDArray[np.floating], grid_thw: tuple[int, int, int]
    ) -> ImageEmbeds:
        """Of `[tokens, text_hidden_size]` float16 or float32, rounded to the nearest bfloat16."""
        return cls(bfloat16_bits_from_floats(image_embeds), grid_thw)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, text_hidden_size)."""
        tokens, width = self.bits.shape
        return tokens, width

    @property
    def size_bytes(self) -> int:
        """Of the values."""
        return self.bits.nbytes

    def floats(self) -> npt.NDArray[np.float32]:
        """The same values in float32, `[tokens, text_hidden_size]`; nothing is lost."""
        return floats_from_bfloat16_bits(self.bits)

    def tensor(self) -> torch.Tensor:
        """The same values as a bfloat16 tensor of its own, on the CPU. Imports torch."""
        import torch

        return torch.from_numpy(self.bits.copy()).view(torch.bfloat16)


def bfloat16_bits_from_floats(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as PyTorch does.

    Args:
        values: float16 or float32, of any shape.

    Returns:
        uint16 of the same shape, a new C-contiguous array. A NaN stays one.
    """
    floats = np.ascontiguousarray(values, dtype=np.float32)
    bits = floats.view(np.uint32)
    # Adding just under a half of the last kept bit, and that bit itself, carries into it exactly
    # where rounding goes up.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    result: npt.NDArray[np.uint16] = np.where(
        np.isnan(floats), (bits >> 16) | _QUIET_NAN, rounded
    ).astype(np.uint16)
    return result


def floats_from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits, of the same shape; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
