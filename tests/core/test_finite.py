"""The finite check against NumPy's own, with one and with several threads."""

from __future__ import annotations

import os
import threading
import time
import weakref

import numpy as np
import pytest

from mmvision_export.core import finite
from mmvision_export.core.finite import finite_rows

LARGEST = np.finfo(np.float32).max


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 5000])
def test_it_is_numpys_answer(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_threads", lambda: threads)
    generator = np.random.default_rng(rows)
    values = generator.standard_normal((rows, 24), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        for row in generator.integers(0, max(rows, 1), min(rows, 5)):
            values[row, generator.integers(0, 24)] = value
    np.testing.assert_array_equal(finite_rows(values), np.isfinite(values).all(axis=1))


def test_sums_of_the_largest_values_do_not_overflow_and_infinities_do_not_cancel() -> None:
    values = np.full((3, 1176), LARGEST, np.float32)
    values[1, :2] = np.inf, -np.inf
    values[2] = -LARGEST
    assert finite_rows(values).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype: type[np.floating]) -> None:
    values = np.ones((3, 8), dtype)
    values[2, 7] = np.nan
    assert finite_rows(values).tolist() == [True, True, False]


def test_it_does_not_wait_for_a_thread_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose cores are all busy."""
    monkeypatch.setattr(finite, "_threads", lambda: 4)
    release = threading.Event()
    blocked = [finite._pool().submit(release.wait) for _ in range(3)]
    try:
        assert finite_rows(np.ones((8192, 8), np.float32)).all()
    finally:
        release.set()
    assert all(future.result() for future in blocked)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_keeps_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_threads", lambda: 4)
    assert finite_rows(np.ones((8192, 8), np.float32)).all()  # the pool's threads run, here
    child = os.fork()
    if not child:
        try:
            values = np.ones((8192, 8), np.float32)
            gone = weakref.ref(values)
            finite_rows(values)
            del values
            until = time.monotonic() + 10
            while gone() is not None and time.monotonic() < until:
                time.sleep(0.01)
            os._exit(0 if gone() is None else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
