"""Work ahead of its taker: in order, bounded, with each item's own error."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from mmvision_export.core.ahead import computed_ahead, mapped, worker_threads


def slower_first(item: int) -> int:
    time.sleep(0.02 if item == 0 else 0)
    return item * item


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_are_in_order(threads: int) -> None:
    items = list(range(20))
    assert mapped(slower_first, items, threads=threads) == [item * item for item in items]
    found = [
        (item, future.result())
        for item, future in computed_ahead(slower_first, items, threads=threads)
    ]
    assert found == [(item, item * item) for item in items]


def test_no_further_ahead_than_threads() -> None:
    begun: list[int] = []
    ahead = computed_ahead(begun.append, iter(range(100)), threads=2)
    taken = 0
    for taken, (_, future) in enumerate(ahead, start=1):
        future.result()
        assert len(begun) <= taken + 2
        if taken == 10:
            break
    ahead.close()
    assert len(begun) <= taken + 2
    assert not any(thread.name.startswith("mmvision-image") for thread in threading.enumerate())


def refuse_three(item: int) -> int:
    if item % 3 == 0 and item:
        raise ValueError(item)
    return item


def test_errors_are_their_items() -> None:
    def result(future: Future[int]) -> object:
        error = future.exception()
        return future.result() if error is None else error.args[0] * 100

    found = [result(future) for _, future in computed_ahead(refuse_three, range(7), threads=3)]
    assert found == [0, 1, 2, 300, 4, 5, 600]
    with pytest.raises(ValueError, match="^3$"):
        mapped(refuse_three, range(7), threads=3)


def test_as_many_threads_as_cpus() -> None:
    assert 1 <= worker_threads() <= 8
