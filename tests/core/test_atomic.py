"""Nothing half-written is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mmvision_export.core import atomic
from mmvision_export.core.atomic import new_directory, new_files, refuse_unwritable, sweep
from mmvision_export.core.errors import OutputError, Reason
from tests.support.errors import refused


def test_directory_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_directory(target, marker="m") as temporary:
        (temporary / "m").write_text("1")
        assert not target.exists()
    assert (target / "m").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


@pytest.mark.skipif(os.name == "nt", reason="no limit on handles")
@pytest.mark.parametrize("lets_go", [True, False])
def test_failure_without_a_free_handle(lets_go: bool, tmp_path: Path) -> None:
    """Threads that read ahead hold every handle, and let go of them a little later.

    The control, where they never do, leaves the temporary directory.
    """
    code = """
import os, resource, sys, threading
from pathlib import Path
from mmvision_export.core.atomic import new_files

taken = []
try:
    with new_files(Path(sys.argv[1]), name="a") as new:
        (new / "a").write_text("1")
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        if sys.argv[2] == "True":
            threading.Timer(0.3, os.closerange, (taken[0], taken[-1] + 1)).start()
        raise ValueError
except ValueError:
    os._exit(5)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(lets_go)]
    assert subprocess.run(command, check=False).returncode == 5
    assert len(list(tmp_path.iterdir())) == (0 if lets_go else 1)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_failure_leaves_the_old_directory(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "m").write_text("old")
    with pytest.raises(type(error)), new_directory(target, marker="m", force=True) as temporary:
        (temporary / "m").write_text("new")
        raise error
    assert (target / "m").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_replacement(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with new_directory(target, marker="m", force=True) as temporary:
            (temporary / "m").write_text(text)
    assert (target / "m").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model", marker="m") as temporary:
        (temporary / "m").write_text("1")
    assert (tmp_path / "model" / "m").exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "no space"), (errno.EACCES, None)],
)
def test_operating_system_errors(code: int, reason: Reason | None, tmp_path: Path) -> None:
    with (
        refused(OutputError, tmp_path, "it", reason=reason),
        new_files(tmp_path, name="it") as new,
    ):
        (new / "half").write_text("x")
        raise OSError(code, "as a full disk would")
    assert not list(tmp_path.iterdir())


def test_files_replace_their_namesakes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with new_files(tmp_path, name="it") as new:
        (new / "a").write_text("new")
        (new / "b").write_text("longer")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "longer"}


def test_what_vouches_for_the_others_is_never_old_beside_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(content: str, last: str | None) -> None:
        with new_files(tmp_path, name="it", last=last) as new:
            (new / "record").write_text(f"{content} record, longer than the file")
            (new / "file").write_text(content)

    write("old", "record")
    moves: list[str] = []

    def fail_at_the_second(self: Path, target: Path) -> Path:
        moves.append(self.name)
        if len(moves) == 2:
            raise OSError(errno.EIO, "as a disk that went away would")
        self.rename(target)
        return target

    monkeypatch.setattr(Path, "replace", fail_at_the_second)
    with pytest.raises(OutputError):
        write("new", "record")
    assert moves == ["file", "record"]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "new"}
    # The control: without it, the larger file goes first, whatever it is.
    moves.clear()
    with pytest.raises(OutputError):
        write("newer", None)
    assert moves == ["record", "file"]


def test_folders_made_for_a_failure_are_removed(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="x"),
        new_directory(tmp_path / "a" / "b" / "model", marker="m"),
    ):
        raise ValueError("x")
    assert not list(tmp_path.iterdir())


def test_a_symbolic_link_stands_for_its_target(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "m").write_text("old")
    link.symlink_to(real)
    with new_directory(link, marker="m", force=True) as temporary:
        (temporary / "m").write_text("new")
    assert link.is_symlink()
    assert (real / "m").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_directory_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with (
        refused(OutputError, target, reason="exists"),
        new_directory(target, marker="m"),
    ):
        target.mkdir()
        (target / "m").write_text("another process")
    assert (target / "m").read_text() == "another process"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_between_the_renames_rolls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "m").write_text("old")
    # As on a system that cannot exchange two names.
    monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    rename, calls = Path.rename, 0

    def interrupted(path: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        new_directory(target, marker="m", force=True) as temporary,
    ):
        (temporary / "m").write_text("new")
    assert (target / "m").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


ENDS_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from typing import Any
from mmvision_export.core.atomic import new_directory, new_files
folder = Path(sys.argv[1])
with new_files(folder, name="x") as new:
    (new / "x").write_text("half")
    print("writing", flush=True)
    {ends}
"""


def writer(folder: Path, ends: str) -> subprocess.Popen[str]:
    """Another process that is in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS_IN_THE_MIDDLE.format(ends=ends), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path: Path) -> None:
    with writer(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") as process:
        assert process.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert str(process.pid) in left.name
    with new_files(tmp_path, name="y") as new:
        (new / "y").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with writer(tmp_path, "sys.stdin.read()") as process:
        (temporary,) = tmp_path.iterdir()
        os.utime(temporary, (0, 0))  # it has been writing for long
        sweep(tmp_path)
        assert temporary.is_dir()
        process.communicate("")
    assert process.returncode == 0
    assert (tmp_path / "x").read_text() == "half"


def test_a_replacement_leaves_no_moment_without_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "m").write_text("old")
    if not atomic._exchanged(tmp_path / "model", tmp_path / "model"):
        pytest.skip("this system cannot exchange names")

    def refused(path: Path, to: Path) -> Path:
        raise AssertionError(f"{path} has no name for a moment")

    monkeypatch.setattr(Path, "rename", refused)
    with new_directory(target, marker="m", force=True) as temporary:
        (temporary / "m").write_text("new")
    assert (target / "m").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_cut_off_between_the_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".old.model").mkdir()
    (tmp_path / ".old.model" / "m").write_text("old")
    with pytest.raises(OutputError), new_directory(tmp_path / "model", marker="m"):
        pass
    assert (tmp_path / "model" / "m").read_text() == "old"


def test_the_folder_that_a_command_runs_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path):
        with refused(OutputError, "runs in"), new_directory(path, marker="m", force=True):
            pass


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with refused(OutputError, tmp_path / "file"):
        refuse_unwritable(tmp_path / "file" / "b")


def test_an_interrupt_while_the_rest_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree
    interrupted: list[Path] = []

    def removed(path: Path, **options: Any) -> None:
        if not interrupted:
            interrupted.append(path)
            signal.raise_signal(signal.SIGINT)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removed)
    # A background job of a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), new_files(tmp_path, name="x") as new:
            (new / "x").write_text("whole")
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def interrupted_at(step: int, folder: Path) -> BaseException | None:
    """Write a file, with SIGINT before the line of that number in this module or contextlib.

    Returns:
        The interruption. As long as its traceback lives, so do the frames, and no generator ends because
        nobody knows it any more.
    """
    lines = 0
    files = {atomic.__file__, contextlib.__file__}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        lines += 1
        if lines == step:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    try:
        sys.settrace(trace)
        with new_files(folder / "deep", name="x") as new:
            (new / "x").write_text("whole")
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(None)
    return None


def test_an_interrupt_at_any_line_leaves_nothing_when_the_process_ends(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    step, left_by_the_block = 0, 0
    try:
        while True:
            step += 1
            folder = tmp_path / str(step)
            folder.mkdir()
            interruption = interrupted_at(step, folder)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            left_by_the_block += bool(list(folder.rglob(".new.*")))
            atomic._remove_unfinished()
            assert list(folder.rglob(".new.*")) == []
            assert all((made / "x").read_text() == "whole" for made in folder.iterdir())
            if interruption is None:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    assert step > 50
    assert left_by_the_block  # the control: the block's end alone is not enough
