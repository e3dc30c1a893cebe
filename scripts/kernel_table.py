"""Compile the plugins' kernels for every architecture and print what they use, as the table of docs/plugins.md.

Run with the head sizes to show: `python scripts/kernel_table.py 64 80`.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor

from mmvision_export.plugin_kernels import (
    ARCHITECTURES,
    CompiledKernel,
    compile_qk_rotary_embedding,
    compile_varlen_attention,
    resource_table,
)


def compiled(sm: int, head_dim: int) -> CompiledKernel:
    """A float16 kernel: attention, or the rotary one for head_dim 0."""
    return compile_varlen_attention(sm, "fp16", head_dim) if head_dim else compile_qk_rotary_embedding(sm, "fp16")


def main() -> None:
    """Print the table."""
    jobs = [(sm, head_dim) for head_dim in (*map(int, sys.argv[1:]), 0) for sm in ARCHITECTURES]
    with ProcessPoolExecutor() as pool:
        print(resource_table(pool.map(compiled, *zip(*jobs, strict=True))))


if __name__ == "__main__":
    main()
