"""What to do about a comparison that failed."""

from __future__ import annotations

from mmvision_export.parity.result import ParityResult, ParityRow

__all__ = ["next_step", "next_step_of"]

_ORDER = {"fp32": 0, "bf16": 1, "fp16": 2}


def next_step(result: ParityResult) -> str | None:
    """What to do about the failures, by what failed first; None if nothing did."""
    failed = [row for row in result.rows if row.failures and row.subject]
    # A float32 graph that is off is a fault, which the others have from it.
    failed.sort(
        key=lambda row: (
            ("fp32", "bf16", "fp16").index(row.precision)
            if row.precision in ("fp32", "bf16", "fp16")
            else 3
        )
    )
    return next_step_of(failed[0], model=str(result.directory)) if failed else None


def next_step_of(row: ParityRow, *, model: str) -> str:
    """What to do about one failure.

    Args:
        row: One with failures.
        model: The model directory, for commands.
    """
    if row.precision in ("int8", "fp8"):
        flag = "--cpu-int8" if "cpu-int8" in str(row.subject) else f"--{row.precision}"
        return (
            "quantise again with the failed images among the calibration images, or keep more units in "
            f"floating point: mmvision quantize {flag} --min-cosine 0.999 --image FILE... --model {model} --force"
        )
    if row.precision == "fp16":
        return (
            "a value may be beyond float16 (see the largest activation): export with --bf16, or build the "
            "engine without --fp16"
        )
    return "the graph computes another function: see where its error jumps, layer by layer (--report accuracy.html)"
