"""Compile the plugins' kernels and print the table of docs/plugins.md.

Run with the head sizes to show: `python scripts/kernel_table.py 64 80`.
"""

from __future__ import annotations

import sys

from mmvision_export.kernels.compile import compile_kernels
from mmvision_export.kernels.resources import ARCHITECTURES, resource_table


def main() -> None:
    """Print the table, of float16 kernels."""
    kernels = [
        k
        for k in compile_kernels(list(ARCHITECTURES), list(map(int, sys.argv[1:])))
        if k.dtype == "fp16"
    ]
    print(resource_table(sorted(kernels, key=lambda k: (-k.head_dim, k.compute_capability))))


if __name__ == "__main__":
    main()
