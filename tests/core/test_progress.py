"""How far a long step is, in words."""

from __future__ import annotations

import threading

import pytest

from mmvision_export.core.progress import Pace, counted_lines, duration


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (95, "1 min 35 s"),
        (3600, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_a_length_of_time(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_done_total_elapsed_and_an_estimate() -> None:
    clock = Clock()
    pace = Pace("running x", 40, clock)
    clock.seconds = 30
    assert pace.describe() == "running x: 0 of 40, 30 s"
    pace.done = 12
    assert pace.describe() == "running x: 12 of 40, 30 s, about 1 min 10 s left"
    pace.done = 40
    assert pace.describe() == "running x: 40 of 40, 30 s"
    assert Pace("writing", None, clock).describe() == "writing: 0 s"


def test_lines_come_ever_more_rarely() -> None:
    clock = Clock()
    pace = Pace("x", None, clock)
    due = []
    for second in range(1000):
        clock.seconds = second
        if pace.is_due():
            due.append(second)
    assert due == [15, 30, 60, 120, 240, 360, 480, 600, 720, 840, 960]


def test_lines_of_a_step_that_tells_nothing() -> None:
    clock, written, came = Clock(), [], threading.Event()
    pace = Pace("building", None, clock)

    def write(line: str) -> None:
        written.append(line)
        came.set()

    with counted_lines(lambda: pace, write):
        clock.seconds = 20
        assert came.wait(10)
    assert written == ["building: 20 s"]
    # The control: a step that has just begun writes none.
    with counted_lines(lambda: Pace("next", None, clock), written.append):
        threading.Event().wait(0.7)
    assert len(written) == 1
