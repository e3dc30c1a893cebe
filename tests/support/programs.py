"""What each program of the attention kernel's grid loads: counted in Triton's interpreter, and predicted."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from mmvision_export.kernels.compile import kernel_module

__all__ = ["ProgramLoads", "counted_loads", "num_tiles", "predicted_loads"]


@dataclasses.dataclass
class ProgramLoads:
    """Of one program of one head.

    Attributes:
        bounds: Loads of one element of `cu_seqlens`, each waiting for the one before it.
        tiles: Loads of queries, keys and values; 0 for a program that has no tile.
    """

    bounds: int = 0
    tiles: int = 0


@contextlib.contextmanager
def counted_loads() -> Iterator[dict[int, ProgramLoads]]:
    """Count what launches in the interpreter load, by the first index of the grid.

    A load whose mask is false everywhere is none.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load
    counts: dict[int, ProgramLoads] = {}

    def counted(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        program = counts.setdefault(self.grid_idx[0], ProgramLoads())
        if np.any(mask.data):
            if pointers.get_element_ty() == tl.int32:
                program.bounds += 1
            else:
                program.tiles += 1
        return load(self, pointers, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted)
        yield counts


def num_tiles(lengths: Sequence[int], block_m: int) -> int:
    """Tiles of one head, and so programs that have one."""
    return sum(-(-length // block_m) for length in lengths)


def predicted_loads(lengths: Sequence[int], block_m: int) -> list[int]:
    """Loads of `cu_seqlens` by each program of one head: those before the exit, or before the tile."""
    bounds = [0, *itertools.accumulate(lengths)]
    num_patches, num_segments = bounds[-1], len(lengths)
    programs = kernel_module("varlen_attention").num_programs(num_patches, num_segments, block_m)
    loads = []
    for program in range(programs):
        low, high, count = 0, min(num_segments, program + 1), 2
        earliest = program - num_patches // block_m
        if earliest >= 0:
            if bounds[earliest] >= num_patches:
                loads.append(1)
                continue
            low, count = earliest, 3
        while high - low > 1:
            middle = (low + high) // 2
            count += 1
            if bounds[middle] // block_m + middle <= program:
                low = middle
            else:
                high = middle
        loads.append(count)
    return loads
