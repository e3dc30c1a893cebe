"""Kills of commands at random moments and at each change they make to the disk, and what is left.

`python -m tests.reliability.kills --moments 200` tries as many; docs/reliability.md has the last figures.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mmvision_export.core.errors import MmvisionError
from tests.reliability.forked import Trials, ended, fresh, left, write_in_place
from tests.reliability.report import Tried, add_arguments, run_and_report

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# SIGTERM may come before the command has begun, and then ends it as it does any process.
_CODES = {0, 130, 143, -signal.SIGKILL, -signal.SIGTERM}


def try_kills(
    trials: Trials, moments: int, points: int, seed: int, *, in_place: bool = False
) -> Iterator[Tried]:
    """Kill an operation, look at what is left, and run it again to its end.

    Args:
        trials: Of the operation.
        moments: Kills at random moments, by SIGKILL, SIGTERM and SIGINT in turn.
        points: Most kills at changes to the disk, by SIGKILL right before them; evenly spread where
            there are more changes.
        seed: Of the moments.
        in_place: The control: the killed command writes its files where they belong at once.
    """
    chance = random.Random(seed)
    begin = {"begin": write_in_place} if in_place else {}
    for number in range(moments):
        seconds, by = chance.uniform(0, trials.seconds), _SIGNALS[number % 3]
        moment = f"{by.name} after {seconds:.2f} s"
        yield _tried(trials, moment, {"kill": (seconds, by), **begin})
    step = max(1.0, trials.changes / max(points, 1))
    for point in range(min(points, trials.changes)):
        change = int(point * step)
        moment = f"change {change} of {trials.changes}"
        yield _tried(trials, moment, {"on_change": functools.partial(_die_at, change), **begin})


def _die_at(change: int, number: int) -> None:
    if number == change:
        os.kill(os.getpid(), signal.SIGKILL)


def _tried(trials: Trials, moment: str, how: dict[str, Any]) -> Tried:
    return Tried(trials.operation.name, moment, _outcome(trials, how))


def _outcome(trials: Trials, how: dict[str, Any]) -> str:
    operation, trial = trials.operation, trials.trial
    fresh(trials.start, trial)
    killed = ended(operation.command, trial, **how)
    if killed.code not in _CODES:
        return f"exit code {killed.code}: {killed.words}"
    try:
        state = operation.state(trial)
    except MmvisionError as error:
        return f"a mix: {error}"
    outcome = trials.word_for(state)
    if outcome is None:
        return f"a mix: {sorted(set(state.items()) ^ set(trials.after.items()))}"
    # Where it is done already, the command says so; it is run again where it may be.
    if outcome != "after" or operation.is_repeatable:
        again = ended(operation.command, trial)
        if again.code != 0:
            return f"the next run: exit code {again.code}: {again.words}"
        if operation.state(trial) != trials.after:
            return "the next run gives another state"
        if remains := left(trial):
            return f"left after the next run: {remains}"
    return outcome


def main() -> None:
    """Kill many, print what did not hold, and count; the exit code is 1 if anything did not hold."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--moments", type=int, default=200)
    arguments.add_argument("--points", type=int, default=1000, help="kills at changes to the disk")
    arguments.add_argument("--in-place", action="store_true", help="the control, which must fail")
    given = add_arguments(arguments).parse_args()
    trial = functools.partial(
        try_kills,
        moments=given.moments,
        points=given.points,
        seed=given.seed,
        in_place=given.in_place,
    )
    sys.exit(run_and_report(given.operation, trial))


if __name__ == "__main__":
    main()
