"""Embeddings as bytes of a table's cell, and back.

A cell is `[tokens, width]` in C order, little-endian. NumPy has no bfloat16: such a cell is read as
float32, which holds each of its values.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = [
    "STORED_TYPES",
    "StoredType",
    "array_from_cell",
    "cell_from_array",
    "rounded_to_bfloat16",
]

StoredType = Literal["bfloat16", "float16", "float32"]
"""Types of a cell. The model's interface to its text part is bfloat16."""

STORED_TYPES: tuple[StoredType, ...] = get_args(StoredType)


def rounded_to_bfloat16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Finite values in bfloat16, to nearest, ties to even; as their 16 bits.

    A value that rounds beyond the largest finite one becomes an infinity.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Half of the last place that stays, less one, and one more where that place is odd.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    sixteen: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    return sixteen


def cell_from_array(image_embeds: npt.NDArray[np.floating], stored: StoredType) -> bytes | None:
    """A cell of finite embeddings; None if a value overflows in the type.

    Args:
        image_embeds: `[tokens, width]` float16 or float32.
        stored: Type of the cell.
    """
    if stored == "bfloat16":
        bits = rounded_to_bfloat16(image_embeds)
        overflows = bool(((bits & 0x7F80) == 0x7F80).any())
        return None if overflows else bits.astype("<u2", copy=False).tobytes()
    with np.errstate(over="ignore"):
        values = image_embeds.astype(np.dtype(stored).newbyteorder("<"))
    return values.tobytes() if np.isfinite(values).all() else None


def array_from_cell(cell: bytes, stored: StoredType, width: int) -> npt.NDArray[np.floating]:
    """The embeddings of a cell.

    Args:
        cell: Of the column `embeddings`.
        stored: The table's `dtype`.
        width: The table's `width`.

    Returns:
        `[tokens, width]`: float16 for float16, else float32. It cannot be written to where it is a
        view of the cell.
    """
    if stored == "bfloat16":
        bits = np.frombuffer(cell, "<u2").astype(np.uint32) << np.uint32(16)
        values: npt.NDArray[np.floating] = bits.view(np.float32)
    else:
        values = np.frombuffer(cell, np.dtype(stored).newbyteorder("<"))
    return values.reshape(-1, width)
