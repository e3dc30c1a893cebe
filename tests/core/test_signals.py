"""Signals wait for the end of a block."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mmvision_export.core.signals import signals_wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_is_not_lost(number: signal.Signals) -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(number, stop)
    try:
        done = []
        with pytest.raises(StoppedError), signals_wait():
            os.kill(os.getpid(), number)
            done.append("the rest of the block")
        assert done
        assert signal.getsignal(number) is stop
        with pytest.raises(StoppedError):  # the control
            os.kill(os.getpid(), number)
            done.append("not reached")
        assert len(done) == 1
    finally:
        signal.signal(number, before)


def test_without_a_signal_and_in_another_thread() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = []

    def work() -> None:
        with signals_wait():
            done.append(True)

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(done) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
