"""The least time the encoder can take on a GPU, computed from its work and the GPU's peaks.

Nothing here is measured.
"""

from __future__ import annotations

import dataclasses
import math

from mmvision_export.benchmark.workloads import Work, work_of
from mmvision_export.models.minimax_m3_vl.config import PRESETS

__all__ = ["GPUS", "TOKENS", "Gpu", "gpu_markdown", "least_seconds"]

TOKENS = (576, 1024, 4096)
"""Image tokens of one image."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU, and who says so.

    Float16 with float32 accumulation, dense, in FLOP/s; memory in bytes/s.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str


GPUS = (
    Gpu(
        "Jetson AGX Orin 64GB",
        42.5e12,
        204.8e9,
        "NVIDIA Jetson AGX Orin technical brief: 170 sparse INT8 TOPS of its GPU, a quarter of that dense in FP16",
    ),
    Gpu(
        "Jetson AGX Thor T5000",
        258e12,
        273e9,
        "NVIDIA Jetson Thor data sheet: 2070 sparse FP4 TFLOPS, an eighth of that dense in FP16",
    ),
    Gpu("RTX 4090", 165.2e12, 1008e9, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Gpu("H100 SXM", 989.4e12, 3350e9, "NVIDIA H100 data sheet, half of the figure with sparsity"),
)


def least_seconds(work: dict[str, Work], gpu: Gpu) -> float:
    """Each operator takes at least as long as the longer of its arithmetic and its traffic."""
    return sum(
        max(item.flops / gpu.flops_per_s, item.bytes / gpu.bytes_per_s) for item in work.values()
    )


def gpu_markdown() -> str:
    """The section of the page, as Markdown."""
    config = PRESETS["full"]
    works = {}
    for tokens in TOKENS:
        side = math.isqrt(tokens * config.patches_per_token)
        works[tokens] = work_of(config, ((1, side, side),), bytes_per_value=2)
    lines = [
        "## On a GPU: computed, not measured",
        "",
        "No GPU has run this. The table counts what the full encoder (865 M parameters, float16) has to do for one image; "
        "attention is counted as one fused kernel that never writes its scores.",
        "",
        "| operator | " + " | ".join(f"{t} tokens: GFLOP | MB" for t in TOKENS) + " |",
        "| --- | " + " | ".join("---: | ---:" for _ in TOKENS) + " |",
    ]
    for name in works[TOKENS[0]]:
        cells = [
            f"{works[t][name].flops / 1e9:.0f} | {works[t][name].bytes / 1e6:.0f}" for t in TOKENS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [
        f"{sum(w.flops for w in works[t].values()) / 1e9:.0f} | {sum(w.bytes for w in works[t].values()) / 1e6:.0f}"
        for t in TOKENS
    ]
    lines += [
        f"| all | {' | '.join(cells)} |",
        "",
        "The least time that leaves, each operator bound by arithmetic or by memory, whichever is longer. A real kernel "
        "reaches a part of a GPU's peak, so that real times are longer; by how much only a measurement can say.",
        "",
        "| GPU | peak, FP16 dense | memory | "
        + " | ".join(f"{t} tokens" for t in TOKENS)
        + " | source of the peaks |",
        "| --- | ---: | ---: | " + " | ".join("---:" for _ in TOKENS) + " | --- |",
    ]
    for gpu in GPUS:
        times = " | ".join(f"{1e3 * least_seconds(works[t], gpu):.1f} ms" for t in TOKENS)
        lines.append(
            f"| {gpu.name} | {gpu.flops_per_s / 1e12:.0f} TFLOP/s | {gpu.bytes_per_s / 1e9:.0f} GB/s | {times} | "
            f"{gpu.source} |"
        )
    return "\n".join(lines) + "\n"
