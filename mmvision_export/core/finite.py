"""Are all values of a batch finite? Asked before every call, and so at the speed of memory.

A row's sum is finite only if all its values are, and a sum is one pass without a temporary. One
core does not read as fast as the memory delivers: a large batch is read by a few threads, from a
queue of pieces, so that one whose core is busy with something else takes few of them and nobody
waits for a thread that did not start.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

__all__ = ["finite_rows"]

# Large enough that handing out pieces costs little; NumPy lets other threads run during a reduction
# of over 500 rows.
_PIECE_ROWS = 1024
_MOST_THREADS = 4


def finite_rows(values: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which rows have no NaN and no infinity.

    Args:
        values: `[rows, columns]` of any float type, C-contiguous.

    Returns:
        `[rows]` bool.
    """
    if values.dtype != np.float32:
        finite: npt.NDArray[np.bool_] = np.isfinite(values).all(axis=1)
        return finite
    # So small that no sum of finite values overflows, and none that is not finite becomes so.
    scale = np.full(values.shape[1], 2.0**-64, np.float32)
    sums = np.empty(len(values), np.float32)
    starts = deque(range(0, len(values), _PIECE_ROWS))

    def sum_pieces() -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            while starts:
                try:
                    start = starts.popleft()
                except IndexError:  # another thread took the last one
                    return
                piece = slice(start, start + _PIECE_ROWS)
                if hasattr(np, "vecdot"):
                    np.vecdot(values[piece], scale, out=sums[piece])
                else:  # NumPy 1
                    np.matmul(values[piece], scale, out=sums[piece])

    helpers = [_pool().submit(sum_pieces) for _ in range(min(_threads(), len(starts)) - 1)]
    sum_pieces()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    return np.isfinite(sums)


def _threads() -> int:
    return min(
        _MOST_THREADS,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="mmvision-finite")


# A forked process has the pool but not its threads: what it handed to them would stay queued, and
# in memory, for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
