"""What float16 and bfloat16 cost at the sizes that servers send, with weights that have outliers.

`python scripts/precision_at_size.py [--preset shallow] [--grid 1x96x144] [--kind outliers]`

PyTorch's encoder in each type against itself in float64, on one image. Its attention keeps the
softmax in float32 and needs memory linear in the patches, as a fused kernel on a GPU does; the
scores of a dense product in float64 would take 24 GB at 13,824 patches. bfloat16 is computed where
the CPU can, else emulated. Prints a table.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch  # noqa: TID253 - a script, and nothing without torch

from mmvision_export.core.metrics import metrics
from mmvision_export.models.minimax_m3_vl.config import PRESETS
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.parity.float64 import Float64Encoder


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="shallow")
    parser.add_argument("--kind", choices=("plain", "outliers"), default="outliers")
    parser.add_argument("--grid", default="1x96x144", help="t x h x w in patches")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    grid = torch.tensor([[int(size) for size in arguments.grid.split("x")]], dtype=torch.int32)
    source = WeightSource.random(arguments.preset, arguments.seed, arguments.kind)
    config = PRESETS[arguments.preset]
    patches = int(grid.prod())
    # Preprocessed pixels are within about 2.7; see `PreprocessorConfig`.
    pixels = np.random.default_rng(arguments.seed).standard_normal(
        (patches, config.patch_dim), dtype=np.float32
    )

    def encoded(encoder: torch.nn.Module, dtype: torch.dtype) -> np.ndarray:
        start = time.perf_counter()
        with torch.inference_mode():
            out = encoder(torch.from_numpy(pixels).to(dtype), grid)
        print(f"  {dtype}: {time.perf_counter() - start:.0f} s", flush=True)
        result: np.ndarray = out.to(torch.float64).numpy()
        return result

    print(
        f"{arguments.preset}, {arguments.kind} weights, {patches} patches, torch {torch.__version__}"
    )
    reference = encoded(Float64Encoder(source.load(torch.float32).encoder), torch.float64)
    print(
        "| precision | relative L2 | least cosine | non-finite values |\n| --- | ---: | ---: | ---: |"
    )
    for precision, dtype in DTYPES.items():
        found = metrics(encoded(source.load(dtype).encoder, dtype), reference)
        print(
            f"| {precision} | {found.relative_l2:.2e} | {found.min_cosine:.6f} "
            f"| {found.non_finite} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
