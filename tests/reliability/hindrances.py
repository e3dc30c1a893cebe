"""Commands that find no room, no permission, no handles or a failing disk, and what they leave.

`python -m tests.reliability.hindrances --count 40` tries as many of each; docs/reliability.md has the last
figures.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmvision_export.core.errors import MmvisionError
from tests.reliability.forked import Trials, ended, fresh, left, write_in_place
from tests.reliability.report import Tried, add_arguments, run_and_report

__all__ = ["HINDRANCES", "possible_hindrances", "try_hindrances"]

_NOBODY = 65534
_NEEDS_ROOT = ("full disk", "read-only", "no permission")
HINDRANCES = ("full disk", "file size", "handles", "read-only", "no permission", "failing change")
"""A small tmpfs; a limit on the size of a file; a limit on handles; a disk mounted read-only; a folder
of another user; an error of the disk at one change after another."""


def possible_hindrances() -> tuple[str, ...]:
    """Those that this user can put in a command's way: a disk of its own needs root."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return tuple(kind for kind in HINDRANCES if kind not in _NEEDS_ROOT)
        subprocess.run(["umount", folder], check=True)
    return HINDRANCES


def try_hindrances(
    trials: Trials, count: int, seed: int, kinds: tuple[str, ...], *, in_place: bool = False
) -> Iterator[Tried]:
    """Hinder an operation, look at what is left, and run it again unhindered.

    Args:
        trials: Of the operation.
        count: Most trials of each kind.
        seed: Of the limits.
        kinds: Of `HINDRANCES`. A full and a read-only disk, and another user's folder, need root.
        in_place: The control: the hindered command writes its files where they belong at once.
    """
    chance = random.Random(seed)
    for kind in kinds:
        for what, how in _cases(kind, trials, count, chance):
            if in_place:
                how["begin"] = functools.partial(_in_place_and, how.get("begin"))
            with _disk(trials, kind, how.pop("size_bytes", None)):
                yield Tried(trials.operation.name, f"{kind}, {what}", _outcome(trials, kind, how))


def _in_place_and(then: Callable[[], None] | None) -> None:
    write_in_place()
    if then is not None:
        then()


def _cases(
    kind: str, trials: Trials, count: int, chance: random.Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind == "full disk":
        least, most = _bytes_in(trials.start), _bytes_in(trials.start) + trials.growth_bytes
        for _ in range(count):
            size = chance.randrange(least + (1 << 16), most + (1 << 17))
            yield f"{size} bytes", {"size_bytes": size}
    elif kind == "file size":
        for _ in range(count):
            size = int(10 ** chance.uniform(3.7, 6.5))  # what it prints goes into a file too
            limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            yield f"{size} bytes", {"begin": limit}
    elif kind == "handles":
        for number in range(min(count, 40)):
            handles = 4 + number
            limit = functools.partial(
                resource.setrlimit, resource.RLIMIT_NOFILE, (handles, handles)
            )
            yield f"{handles}", {"begin": limit}
    elif kind == "failing change":
        step = max(1.0, trials.changes / count)
        for point in range(min(count, trials.changes)):
            change = int(point * step)
            yield (
                f"{change} of {trials.changes}",
                {"on_change": functools.partial(_fail_at, change)},
            )
    else:
        become_nobody = functools.partial(os.setresuid, _NOBODY, _NOBODY, _NOBODY)
        yield "", {"begin": become_nobody} if kind == "no permission" else {}


def _fail_at(change: int, number: int) -> None:
    if number == change:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextlib.contextmanager
def _disk(trials: Trials, kind: str, size_bytes: int | None) -> Iterator[None]:
    """The trial's folder, on a disk of its own where that is the hindrance."""
    trial = trials.trial
    if kind not in ("full disk", "read-only"):
        fresh(trials.start, trial)
        yield
        return
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    size = f"size={size_bytes}" if size_bytes else "size=64m"
    _mount("-t", "tmpfs", "-o", size, "tmpfs", str(trial))
    try:
        shutil.copytree(trials.start, trial, dirs_exist_ok=True)
        if kind == "read-only":
            _mount("-o", "remount,ro", str(trial))
        yield
    finally:
        subprocess.run(["umount", str(trial)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _bytes_in(folder: Path) -> int:
    return sum(
        -(-path.stat().st_size // 4096) * 4096 if path.is_file() else 4096
        for path in folder.rglob("*")
    )


def _outcome(trials: Trials, kind: str, how: dict[str, Any]) -> str:
    operation, trial = trials.operation, trials.trial
    hindered = ended(operation.command, trial, **how)
    lines = hindered.words.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    if hindered.code not in (0, 1):
        return f"exit code {hindered.code}: {hindered.words[-600:]}"
    if hindered.code == 1 and (not errors or "Traceback" in hindered.words):
        return f"no error in words: {hindered.words[-900:]}"
    if any("not foreseen" in line for line in errors):
        return f"not foreseen: {hindered.words[-900:]}"
    try:
        state = operation.state(trial)
    except MmvisionError as error:
        return f"a mix: {error}"
    outcome = trials.word_for(state)
    if outcome is None:
        return f"a mix: {sorted(set(state.items()) ^ set(trials.after.items()))}"
    if hindered.code == 0 and outcome != "after":
        return f"exit code 0, and the state is {outcome}"
    # What fails may be the removal itself.
    if kind != "failing change" and (remains := left(trial)):
        return f"left: {remains}"
    if outcome != "after" and kind in ("file size", "handles", "failing change"):
        again = ended(operation.command, trial)
        if again.code != 0 or operation.state(trial) != trials.after:
            return f"the next run: exit code {again.code}: {again.words[-600:]}"
        if remains := left(trial):
            return f"left after the next run: {remains}"
    return outcome


def main() -> None:
    """Hinder many, print what did not hold, and count; the exit code is 1 if anything did not hold."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--count", type=int, default=40)
    arguments.add_argument("--kind", nargs="+", choices=HINDRANCES, default=possible_hindrances())
    arguments.add_argument("--in-place", action="store_true", help="the control, which must fail")
    given = add_arguments(arguments).parse_args()
    trial = functools.partial(
        try_hindrances,
        count=given.count,
        seed=given.seed,
        kinds=tuple(given.kind),
        in_place=given.in_place,
    )
    sys.exit(run_and_report(given.operation, trial))


if __name__ == "__main__":
    main()
