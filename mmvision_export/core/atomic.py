"""Files written whole or not at all, however the process ends.

What is being written lives under a temporary name beside its target, on the same file system, and
takes the target's place in one rename once it is whole and on the disk.

A temporary directory goes with the block that made it, or with the process: a signal may arrive
between any two lines, also between the end of the block and its removal. A process that is killed
leaves its temporary directory. The process holds a lock on it, which ends with the process: the next
one that writes to the same folder removes what nobody holds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmvision_export.core.errors import OutputError
from mmvision_export.core.signals import signals_wait

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "locked_folder",
    "new_directory",
    "new_files",
    "refuse_existing",
    "refuse_unwritable",
    "sweep",
]

_PREFIX = ".new."
# A temporary directory is made first and locked then: until it is this old, only a process that is
# known to be dead gives it up.
_SECONDS_TO_LOCK = 60.0
_SECONDS_TO_REMOVE = 2.0
_NO_HANDLE = {errno.EMFILE, errno.ENFILE}
# <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}

# None is what NumPy and onnx-ir raise for a write that the disk took only a part of.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None}


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: Where the directory shall be; a symbolic link stands for what it points to. Missing
            parents are made.
        marker: A file that every directory of this kind has. One without it is somebody else's, and
            never replaced.
        force: Replace what is there; otherwise it is refused. The old directory stays until the new
            one is whole.

    Raises:
        OutputError: `path` exists and may not be replaced, or it cannot be written.
    """
    if path.is_symlink() or path.name in ("", ".."):
        path = path.resolve()
    _recover(path)
    refuse_existing(path, marker=marker, force=force)
    with _temporary_directory(path.parent, path.name) as temporary:
        yield temporary
        _flush(temporary)
        refuse_existing(path, marker=marker, force=force)  # it may have come into being meanwhile
        if not path.exists():
            temporary.rename(path)
            return
        if _exchanged(temporary, path):
            return  # the old directory has the temporary one's name now, and goes with it
        old = _old_name(path)
        try:
            path.rename(old)
            temporary.rename(path)
        except BaseException:
            if not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path, *, name: str, last: str | None = None) -> Iterator[Path]:
    """A temporary directory whose files move into `folder` when the block ends well.

    They replace their namesakes.

    Args:
        folder: Where the files go. Missing folders are made.
        name: What is being written, for an error's message.
        last: The file that vouches for the others, such as a record. Its old namesake goes first and
            the new one comes last. A process that is killed between two moves then leaves files that
            nothing vouches for, and never an old record beside new files.

    Raises:
        OutputError: The files cannot be written.
    """
    with _temporary_directory(folder, name) as temporary:
        yield temporary
        _flush(temporary)
        # The largest first: a weight file before the graph that points into it.
        files = sorted(temporary.iterdir(), key=lambda f: (f.name == last, -f.stat().st_size))
        if last is not None and any((folder / file.name).exists() for file in files[:-1]):
            (folder / last).unlink(missing_ok=True)
            _flush_entry(folder)
        for file in files:
            file.replace(folder / file.name)
        _flush_entry(folder)


def refuse_existing(path: Path, *, marker: str, force: bool) -> None:
    """Raise `OutputError` if `path` exists and `new_directory` would not replace it."""
    if path.exists() and path.resolve() == Path.cwd():
        # Another directory takes its place, and whoever works in the old one is nowhere.
        raise OutputError(
            f"{path} is the folder that this command runs in",
            hint="name a new folder inside it, as --output model",
        )
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(
            f"{path} already exists",
            hint="choose another --output, or replace it with --force",
            reason="exists",
        )
    if not (path / marker).is_file():
        raise OutputError(
            f"{path} has no {marker}: --force replaces model directories only",
            hint="choose another --output",
        )


def refuse_unwritable(folder: Path) -> None:
    """Refuse, before the work, a folder in which nothing could be written after it.

    Args:
        folder: It may be missing: then it would be made in the nearest of its parents that is there.

    Raises:
        OutputError: Says why.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        Path(
            tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}.", suffix=".partial", dir=there)
        ).rmdir()
    except OSError as error:
        raise OutputError(
            f"{there}: cannot be written to: {error.strerror}",
            hint="copy it to a folder where you may write, or choose such a folder",
        ) from error


@contextlib.contextmanager
def _temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    unfinished = _Unfinished(
        parent / f"{_PREFIX}{os.getpid()}.{secrets.token_hex(6)}.partial",
        [folder for folder in (parent, *parent.parents) if not folder.exists()],
    )
    try:
        # Known before it is made: a signal between the two leaves nothing that nobody knows of.
        _UNFINISHED.add(unfinished)
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        unfinished.path.mkdir()
        unfinished.lock = _locked(unfinished.path)
        yield unfinished.path
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(
                f"{parent}: no space left while writing {name}",
                hint="free some space; nothing was kept",
                reason="no space",
            ) from error
        raise OutputError(f"{parent}: cannot write {name}: {error.strerror}") from error
    finally:
        # A signal in the middle would leave the rest until the process ends.
        with signals_wait():
            unfinished.remove()


@dataclass(eq=False)
class _Unfinished:
    """A temporary directory, and what goes with it."""

    path: Path
    made: list[Path]  # folders that were made for it, the innermost first
    lock: int | None = None

    def remove(self) -> None:
        """Again, it does nothing: a generator may end after the process has done so."""
        lock, self.lock = self.lock, None
        _remove(self.path, lock)
        for folder in self.made:
            # Empty only if the block failed.
            with contextlib.suppress(OSError):
                folder.rmdir()
        _UNFINISHED.discard(self)


_UNFINISHED: set[_Unfinished] = set()


def _remove_unfinished() -> None:
    for unfinished in list(_UNFINISHED):
        unfinished.remove()


atexit.register(_remove_unfinished)
if hasattr(os, "register_at_fork"):
    # They are the parent's, which removes them.
    os.register_at_fork(after_in_child=_UNFINISHED.clear)


def _remove(temporary: Path, lock: int | None) -> None:
    """Remove a temporary directory, and let go of its lock.

    A removal takes two handles. Where none was left, the lock's is free after the first attempt, and
    other threads, which read ahead, let go of theirs.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    if lock is not None:
        os.close(lock)
    give_up = time.monotonic() + _SECONDS_TO_REMOVE
    while temporary.exists():
        try:
            shutil.rmtree(temporary)
        except OSError as error:
            if error.errno not in _NO_HANDLE or time.monotonic() > give_up:
                shutil.rmtree(temporary, ignore_errors=True)
                return
            time.sleep(0.01)


def sweep(folder: Path) -> None:
    """Remove the temporary directories of processes that were killed, if there are any."""
    if fcntl is None:
        return
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            age = time.time() - left.stat().st_mtime
            if age < _SECONDS_TO_LOCK and _may_live(left):
                continue
            lock = _locked(left)
            if lock is not None:
                _remove(left, lock)


def _may_live(temporary: Path) -> bool:
    """Whether the process in a temporary directory's name may be running."""
    pid = temporary.name.removeprefix(_PREFIX).partition(".")[0]
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _locked(directory: Path) -> int | None:
    """A handle that holds a directory for this process; None if another holds it, or none can."""
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """For the block, no other process is in a block of this function for the same folder.

    Raises:
        OutputError: The folder cannot be opened.
    """
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise OutputError(f"{folder}: no such folder", reason="missing") from error


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step, where the system can (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _old_name(path: Path) -> Path:
    """Where a directory is for the moment in which another takes its place."""
    return path.with_name(f".old.{path.name}")


def _recover(path: Path) -> None:
    """Put back a directory whose replacement was cut off between two renames."""
    with contextlib.suppress(OSError):
        if _old_name(path).is_dir() and not path.exists():
            _old_name(path).rename(path)


def _flush(directory: Path) -> None:
    """Have everything in a directory on the disk, so that a rename cannot outlive its content."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _flush_entry(Path(folder) / name)
        _flush_entry(Path(folder))


def _flush_entry(path: Path) -> None:
    if path.is_symlink() or os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(handle)
