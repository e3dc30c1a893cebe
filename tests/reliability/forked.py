"""Commands in forks of this process, which are killed or hindered, and what they leave.

One process loads the packages and forks for each command, so that a trial costs a second and not ten. It
computes nothing itself: a fork of a process with worker threads has none of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.core import atomic
from tests.reliability.operations import OPERATIONS, Operation, State, prepare

__all__ = [
    "Ended",
    "OnChange",
    "Trials",
    "ended",
    "fresh",
    "given_files",
    "left",
    "trials_of",
    "write_in_place",
]

OnChange = Callable[[int], None]
"""Told the number of each change to the disk before it is made. It may raise, or end the process."""

_SECONDS_TO_END = 120.0
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
# Audit events of Python that change the disk, besides those of opening a file for writing.
_CHANGES = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code, negative for a signal.
        words: What it printed, to either stream.
        changes: How many changes to the disk it made, where it was not killed.
    """

    code: int
    words: str
    changes: int


@dataclasses.dataclass(frozen=True)
class Trials:
    """What trials of one operation begin with, and what they are held to.

    Attributes:
        operation: The operation.
        start: A folder that each trial gets a copy of.
        trial: Where that copy goes.
        before: The state there.
        after: The state after the command, undisturbed.
        changes: How many changes to the disk the command makes.
        seconds: How long it takes.
        growth_bytes: How much more its folder holds then, at least.
    """

    operation: Operation
    start: Path
    trial: Path
    before: State
    after: State
    changes: int
    seconds: float
    growth_bytes: int

    def word_for(self, state: State) -> str | None:
        """`before`, `without`, `after` or `part`, or None for a state that must not be."""
        if state == self.before:
            return "before"
        if state == self.after:
            return "after"
        withdrawn = self.operation.withdraws
        if withdrawn and state == {k: v for k, v in self.before.items() if k not in withdrawn}:
            return "without"
        is_part = self.before.items() <= state.items() <= self.after.items()
        return "part" if is_part and not self.operation.is_whole else None


def trials_of(folder: Path, operation: Operation) -> Trials:
    """Prepare an operation's trials, beside the folder of `given_files`.

    Raises:
        RuntimeError: The operation fails undisturbed, or changes nothing: then anything would hold.
    """
    start, trial = folder.parent / "start", folder.parent / "trial"
    fresh(folder, start)
    commands = {each.name: each.command for each in OPERATIONS}
    for earlier in operation.prepare:
        _ended_well(commands[earlier], start)
    seconds = 0.0
    for _ in range(2):
        fresh(start, trial)
        begin = time.monotonic()
        changes = _ended_well(operation.command, trial).changes
        seconds = max(seconds, time.monotonic() - begin)
    before, after = operation.state(start), operation.state(trial)
    if before == after:
        raise RuntimeError(f"{operation.name} changes nothing that its state tells")
    growth = max(0, _bytes_in(trial) - _bytes_in(start))
    return Trials(operation, start, trial, before, after, changes, seconds, growth)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ended_well(command: Sequence[str], folder: Path) -> Ended:
    result = ended(command, folder)
    if result.code != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {result.code}: {result.words}")
    return result


@contextlib.contextmanager
def given_files() -> Iterator[Path]:
    """A folder with what operations work on, and the packages loaded for their forks."""
    root = Path(tempfile.mkdtemp())
    _adopt_orphans()
    try:
        # In a process of its own: what it computes starts threads.
        if (child := os.fork()) == 0:
            prepare(root / "given")
            os._exit(0)
        os.waitpid(child, 0)
        _load_packages()
        yield root / "given"
    finally:
        shutil.rmtree(root)


def _adopt_orphans() -> None:
    """Make this process the parent of what its children leave running, so that it can wait for them."""
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def fresh(start: Path, trial: Path) -> None:
    """A copy of one folder in another's place."""
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(start, trial)


def left(trial: Path) -> list[str]:
    """Temporary directories but those in the user's cache, which the next that writes there sweeps."""
    found = (path.relative_to(trial) for path in trial.rglob(".new.*"))
    return [str(path) for path in found if not path.parts[0].startswith("xdg_")]


def write_in_place() -> None:
    """From now on, this process writes files where they belong at once: the control of all this."""

    @contextlib.contextmanager
    def in_place(parent: Path, name: str) -> Iterator[Path]:
        parent.mkdir(parents=True, exist_ok=True)
        yield parent

    vars(atomic)["_temporary_directory"] = in_place


def ended(
    command: Sequence[str],
    folder: Path,
    *,
    begin: Callable[[], None] = lambda: None,
    on_change: OnChange = lambda number: None,
    kill: tuple[float, signal.Signals] | None = None,
) -> Ended:
    """Run a command in a fork.

    Args:
        command: Arguments of `mmvision`.
        folder: Where it runs; its user's settings and cache are there too.
        begin: What the fork does first, such as limiting itself.
        on_change: See `OnChange`.
        kill: After how many seconds, and by which signal.
    """
    log, changes = folder.parent / "log", folder.parent / "changes"
    changes.write_text("0")
    child = os.fork()
    if child == 0:
        _run(command, folder, (log, changes), begin, on_change)
    deadline = time.monotonic() + _SECONDS_TO_END
    if kill is not None:
        time.sleep(kill[0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, kill[1])
    while True:
        is_done, status = os.waitpid(child, os.WNOHANG)
        if is_done or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    _end_group(child)
    if not is_done:
        return Ended(-1, f"still running after {_SECONDS_TO_END:.0f} s", 0)
    words = log.read_text(errors="replace").strip()
    return Ended(os.waitstatus_to_exitcode(status), words, int(changes.read_text() or 0))


def _end_group(leader: int) -> None:
    """Kill a command, if it still runs, and what it has started, but not compilers: they have sessions of their own.

    It waits for their end: until then they keep a disk that they work on from being unmounted.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-leader, 0)


def _run(
    command: Sequence[str],
    folder: Path,
    notes: tuple[Path, Path],
    begin: Callable[[], None],
    on_change: OnChange,
) -> None:
    """Run a command in this process, and end the process with the command's exit code."""
    code: Any = 1
    log, changes = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in notes)
    try:
        os.setsid()
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(log, stream)
        for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            os.environ[variable] = str(folder / variable.lower())
        sys.argv = ["mmvision", *command]
        from mmvision_export.cli.app import main

        begin()
        counted = _watch_changes(on_change)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        os.write(changes, str(len(counted)).encode())
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _watch_changes(on_change: OnChange) -> list[str]:
    """Names of the changes to the disk that this process makes from now on."""
    counted: list[str] = []

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
            if not writes or str(path).startswith("/dev/"):
                return
        elif event not in _CHANGES:
            return
        on_change(len(counted))
        counted.append(event)

    sys.addaudithook(seen)
    return counted


def _load_packages() -> None:
    """What a command imports, once for all forks. None of it may start a thread."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    import mmvision_export.cli.app
    import mmvision_export.export.onnx_export
    import mmvision_export.parity.check
    import mmvision_export.quantize.quantize
    import mmvision_export.run  # noqa: F401

    torch.set_num_threads(1)
