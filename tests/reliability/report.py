"""What came of many trials, as one line of JSON for each operation."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.reliability.forked import Trials, given_files, trials_of
from tests.reliability.operations import OPERATIONS

__all__ = ["Tried", "add_arguments", "rows_of", "run_and_report"]

_HELD = ("before", "without", "after", "part")


@dataclasses.dataclass(frozen=True)
class Tried:
    """One trial and what came of it.

    Attributes:
        operation: Its name.
        trouble: What happened to it, and when.
        outcome: `before`, `without`, `after` or `part`, as the state was then; otherwise what did not hold.
    """

    operation: str
    trouble: str
    outcome: str

    @property
    def is_held(self) -> bool:
        """Whether the promise held."""
        return self.outcome in _HELD


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Which operations, and the seed."""
    names = [operation.name for operation in OPERATIONS]
    parser.add_argument("--operation", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_and_report(names: Sequence[str], trial: Callable[[Trials], Iterable[Tried]]) -> int:
    """Try each operation, print what did not hold and a row of counts, and give an exit code."""
    broken = 0
    with given_files() as folder:
        for operation in (each for each in OPERATIONS if each.name in names):
            begin = time.monotonic()
            tried = []
            for each in trial(trials_of(folder, operation)):
                tried.append(each)
                if not each.is_held:
                    print(f"{each.operation}, {each.trouble}: {each.outcome}", flush=True)
            counts = collections.Counter(each.outcome for each in tried if each.is_held)
            not_held = sum(not each.is_held for each in tried)
            broken += not_held
            row = {
                "operation": operation.name,
                "trials": len(tried),
                "not_held": not_held,
                **{word: counts[word] for word in _HELD},
                "seconds": round(time.monotonic() - begin),
            }
            print(json.dumps(row), flush=True)
    return int(broken > 0)


def rows_of(program: str, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows, and all that was printed, of `kills` or `hindrances` in a process of its own.

    The caller may have threads, and these programs fork.
    """
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.reliability.{program}", *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [
        json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"operation')
    ]
    return ended.returncode, rows, ended.stdout + ended.stderr
