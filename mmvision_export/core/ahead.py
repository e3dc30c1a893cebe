"""Work done on threads a little ahead of whoever takes its results, in order.

What is worked on releases the GIL: Pillow while it decodes and resizes, NumPy while it copies.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["computed_ahead", "mapped", "worker_threads"]

_MOST_THREADS = 8
_NAME = "mmvision-image"

T = TypeVar("T")
R = TypeVar("R")


def worker_threads() -> int:
    """As many as this process may use CPUs, up to 8."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cpus = os.cpu_count() or 1
    return max(1, min(cpus, _MOST_THREADS))


def mapped(function: Callable[[T], R], items: Sequence[T], *, threads: int) -> list[R]:
    """The function's result for each item, in order.

    The first item's error in that order is raised; what was not begun by then is not done.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_NAME)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def computed_ahead(
    function: Callable[[T], R], items: Iterable[T], *, threads: int
) -> Generator[tuple[T, Future[R]], None, None]:
    """Each item with its result or error to come, in order, `threads` of them ahead.

    Close the iterator to drop what was not begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_NAME)
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > threads:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
