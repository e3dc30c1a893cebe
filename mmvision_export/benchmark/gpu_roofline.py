"""Times and costs on a GPU, computed from the encoder's work and the GPU's peaks. Nothing here is measured.

`python -m mmvision_export.benchmark.gpu_roofline` prints the tables of docs/scale.md.
"""

from __future__ import annotations

import dataclasses
import math

from mmvision_export.benchmark.workloads import Work, work_of
from mmvision_export.models.minimax_m3_vl.config import PRESETS

__all__ = [
    "GPUS",
    "TOKENS",
    "Gpu",
    "cost_markdown",
    "gpu_markdown",
    "hours_per_million",
    "least_seconds",
]

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
    Gpu("L4", 121e12, 300e9, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    Gpu("RTX 4090", 165.2e12, 1008e9, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Gpu("H100 SXM", 989.4e12, 3350e9, "NVIDIA H100 data sheet, half of the figure with sparsity"),
)


_PHOTOGRAPHS = (
    ((1, 28, 36), "392 x 504"),
    ((1, 48, 48), "672 x 672"),
    ((1, 96, 144), "1344 x 2016"),
)
"""Grid, and height and width in pixels: a thumbnail, the most of the rule `area`, and SGLang's of a photograph."""

_SHARE_OF_PEAK = 0.5


def hours_per_million(grid: tuple[int, int, int], gpu: Gpu) -> float:
    """GPU hours for a million images of one grid, at half of the arithmetic's peak."""
    work = work_of(PRESETS["full"], (grid,), bytes_per_value=2)
    flops = sum(item.flops for item in work.values())
    return 1e6 * flops / (_SHARE_OF_PEAK * gpu.flops_per_s) / 3600


def cost_markdown() -> str:
    """GPU hours of a million images, as a table in Markdown."""
    config = PRESETS["full"]
    titles = [f"{pixels}: {t * h * w} patches" for (t, h, w), pixels in _PHOTOGRAPHS]
    lines = [
        f"| | {' | '.join(titles)} |",
        f"| --- |{' ---: |' * len(titles)}",
    ]
    counted = []
    for grid, _ in _PHOTOGRAPHS:
        work = work_of(config, (grid,), bytes_per_value=2)
        counted.append(f"{sum(item.flops for item in work.values()) / 1e12:.1f}")
    lines.append(f"| TFLOP an image | {' | '.join(counted)} |")
    tokens = [math.prod(grid) // config.patches_per_token for grid, _ in _PHOTOGRAPHS]
    sizes = [f"{count * config.text_hidden_size * 2 / 1e6:.1f}" for count in tokens]
    lines.append(f"| MB of bf16 embeddings an image | {' | '.join(sizes)} |")
    for gpu in GPUS:
        hours = (f"{hours_per_million(grid, gpu):,.1f}" for grid, _ in _PHOTOGRAPHS)
        lines.append(f"| {gpu.name}, GPU hours a million | {' | '.join(hours)} |")
    return "\n".join(lines) + "\n"


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
        "The table counts the work of the full encoder (865 M parameters, float16) for one image. "
        "Attention is counted as one fused kernel that never writes its scores.",
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
        "The next table has the least time that follows. Each operator is bound by arithmetic or by memory, "
        "whichever takes longer. A real kernel reaches a part of a GPU's peak, so real times are longer. Only a "
        "measurement can say by how much.",
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


if __name__ == "__main__":
    print(cost_markdown())
    print(gpu_markdown())
