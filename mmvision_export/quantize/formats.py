"""The two 8-bit formats, symmetric around zero, and how values are rounded to them."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.precision import PRECISIONS, Precision

__all__ = ["FP8", "INT8", "EightBitFormat", "scale_from_magnitude"]

Floats = npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class EightBitFormat:
    """A storage format with a scale: a value is stored as `value / scale`, rounded.

    Attributes:
        name: As on the command line.
        dtype: ONNX's element type.
        maximum: Largest magnitude that is used.
    """

    name: str
    dtype: ir.DataType
    maximum: float

    def quantized(self, values: Floats, scale: Floats) -> npt.NDArray[np.generic]:
        """Values as stored, with ONNX `QuantizeLinear`'s rounding: to nearest even, saturating.

        Args:
            values: Any shape, float.
            scale: Broadcast against `values`.
        """
        scaled = np.clip(values / scale, -self.maximum, self.maximum)
        if self.dtype == ir.DataType.INT8:
            return np.rint(scaled).astype(np.int8)
        return scaled.astype(ml_dtypes.float8_e4m3fn)

    def rounded(self, values: Floats, scale: Floats) -> npt.NDArray[np.float32]:
        """Values after storing and reading back, float32."""
        result: npt.NDArray[np.float32] = (
            self.quantized(values, scale).astype(np.float32) * scale
        ).astype(np.float32)
        return result

    def rounded_weight(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A product's weight `[out, in]` after storing and reading back, with a scale for each output channel."""
        largest = np.abs(weight).max(axis=1, keepdims=True)
        return self.rounded(weight, scale_from_magnitude(largest, self.maximum))

    @classmethod
    def of(cls, precision: Precision) -> EightBitFormat:
        """The format of a quantised precision's products."""
        return cls(precision.name, ir.DataType[precision.onnx_type], precision.largest)


INT8, FP8 = (EightBitFormat.of(PRECISIONS[name]) for name in ("int8", "fp8"))


def scale_from_magnitude(magnitude: npt.ArrayLike, maximum: float) -> npt.NDArray[np.float32]:
    """The scale at which `magnitude` is the largest value stored, rounded to float16.

    It is float16 in the graph.

    Args:
        magnitude: Largest magnitude, per tensor or per channel; not negative.
        maximum: Of the format.
    """
    # A channel of zeros, or one too small for float16's exponent, gets the smallest normal scale.
    scale = np.maximum(
        np.asarray(magnitude, np.float64) / maximum, np.finfo(np.float16).smallest_normal
    )
    rounded: npt.NDArray[np.float32] = scale.astype(np.float16).astype(np.float32)
    return rounded
