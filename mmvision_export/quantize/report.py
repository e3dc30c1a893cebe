"""What was done, for the manifest and for people."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["QuantizationReport"]


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What was done, for the manifest.

    Attributes:
        flavour: int8, fp8 or cpu-int8.
        source: The graph it was made from, by file name; its attention is the flavour's.
        calibration_method: minmax, percentile or entropy; for cpu-int8 `none`, since it measures
            while it runs.
        min_cosine: The gate.
        margin: How many times less than the gate allows `1 - cosine` may be: see `evidence`.
        reached: Smallest cosine of a token with the float32 graph's, on every image checked.
        without_fallback: The same with every unit quantised, up to the first batch that failed.
        held_out: Images that calibration had not seen; crops and sizes of one count as one.
        calibration: Images that it had seen, all of which were checked too.
        evaluations: Whole graphs that were measured.
        operations: Share of the products' operations in 8 bit; attention's are not among them.
        size_bytes: Of the flavour's weights, shared ones included.
        float_size_bytes: Of the weights it would have with no unit quantised, in its float type.
        balanced: Units whose layer norm was balanced.
        quantized: Of each quantised unit, the cosine that it alone takes from the worst tokens of an image,
            estimated; of the image where that is most.
        kept: The same of each unit that stayed in higher precision, worst first.
    """

    flavour: str
    source: str
    calibration_method: str
    min_cosine: float
    margin: float
    reached: float
    without_fallback: float
    held_out: int
    calibration: int
    evaluations: int
    operations: float
    size_bytes: int
    float_size_bytes: int
    balanced: list[str]
    quantized: dict[str, float]
    kept: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)
