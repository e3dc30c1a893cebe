"""The precisions, one row each: what every stage has to know of them.

A new precision is a row here, and its flag on the command line.
"""

from __future__ import annotations

import dataclasses

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.gate import Gate

__all__ = ["FLOAT_PRECISIONS", "PRECISIONS", "QUANTIZED_PRECISIONS", "Precision"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision of a graph or an engine.

    In a quantised one the operands of the large products have fewer bits than the hidden states.

    Attributes:
        name: On the command line, in records and in file names.
        dtype: Type of the products' operands, by the name that torch, NumPy and ml_dtypes share.
        onnx_type: The same in `onnx.TensorProto.DataType`.
        tensorrt_type: The same in TensorRT's `DataType`.
        hidden: Precision of the hidden states: itself, unless it is quantised.
        io_dtype: NumPy type of pixel_values and image_embeds.
        largest: Largest magnitude of the operands that is used.
        unit_roundoff: Largest relative error of rounding an operand to nearest; of an integer type,
            relative to `largest`.
        derived_from: Precisions of `model.onnx` that its graph can be made from, beside its own.
        lowest_capability: First GPUs whose tensor cores have the type, or None for all.
        gate: What a graph must reach on every input, against PyTorch in float64.
    """

    name: str
    dtype: str
    onnx_type: str
    tensorrt_type: str
    hidden: str
    io_dtype: str
    largest: float
    unit_roundoff: float
    derived_from: tuple[str, ...] = ()
    lowest_capability: ComputeCapability | None = None
    gate: Gate

    @property
    def is_quantized(self) -> bool:
        """Whether operands have fewer bits than the hidden states."""
        return self.hidden != self.name

    @property
    def has_half_attention(self) -> bool:
        """Whether attention is in 16 bits, which fused kernels and plugins are for."""
        return self.hidden != "fp32"

    def runs_on(self, capability: ComputeCapability) -> bool:
        """Whether a GPU's tensor cores have the type."""
        return self.lowest_capability is None or capability >= self.lowest_capability


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision(
            name="fp32",  # IEEE 754 binary32
            dtype="float32",
            onnx_type="FLOAT",
            tensorrt_type="FLOAT",
            hidden="fp32",
            io_dtype="float32",
            largest=(2 - 2**-23) * 2.0**127,
            unit_roundoff=2**-24,
            # Rounding (6e-8) accumulated over the depth measures about 1e-6; a wrong formula
            # measures above 1e-3.
            gate=Gate(max_relative_l2=1e-5, min_cosine=0.999999, times_eager=None),
        ),
        Precision(
            name="fp16",  # IEEE 754 binary16
            dtype="float16",
            onnx_type="FLOAT16",
            tensorrt_type="HALF",
            hidden="fp16",
            io_dtype="float16",
            largest=65504.0,
            unit_roundoff=2**-11,
            derived_from=("fp32",),
            gate=Gate(max_relative_l2=None, min_cosine=0.999, times_eager=2.0),
        ),
        Precision(
            name="bf16",  # binary32's exponent, 8 bits of significand
            dtype="bfloat16",
            onnx_type="BFLOAT16",
            tensorrt_type="BF16",
            hidden="bf16",
            io_dtype="float32",  # NumPy has no bfloat16
            largest=(2 - 2**-7) * 2.0**127,
            unit_roundoff=2**-8,
            lowest_capability=ComputeCapability(8, 0),
            gate=Gate(max_relative_l2=None, min_cosine=0.99, times_eager=2.0),
        ),
        # PyTorch has no counterpart that quantises as the last two do, so that no gate is a
        # multiple of its error: the tokens' direction is what a language model reads.
        Precision(
            name="int8",
            dtype="int8",
            onnx_type="INT8",
            tensorrt_type="INT8",
            hidden="fp16",
            io_dtype="float16",
            largest=127.0,  # -128 is left unused, so that the range is symmetric
            unit_roundoff=0.5 / 127,
            derived_from=("fp32",),
            gate=Gate(max_relative_l2=None, min_cosine=0.999, times_eager=None),
        ),
        Precision(
            # E4M3 without infinities (Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
            # arXiv:2209.05433)
            name="fp8",
            dtype="float8_e4m3fn",
            onnx_type="FLOAT8E4M3FN",
            tensorrt_type="FP8",
            hidden="fp16",
            io_dtype="float16",
            largest=448.0,
            unit_roundoff=2**-4,
            derived_from=("fp32",),
            lowest_capability=ComputeCapability(8, 9),
            gate=Gate(max_relative_l2=None, min_cosine=0.999, times_eager=None),
        ),
    )
}
"""By name."""

FLOAT_PRECISIONS = tuple(name for name, row in PRECISIONS.items() if not row.is_quantized)
"""Those of `model.onnx`."""

QUANTIZED_PRECISIONS = tuple(name for name, row in PRECISIONS.items() if row.is_quantized)
"""Those that `mmvision quantize` makes graphs of for engines."""
