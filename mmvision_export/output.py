"""Writing results so that nothing half-written is ever left behind, not by an error, a full disk or Ctrl-C.

What is being written lives under a temporary name beside its target, on the same file system, and takes the target's
place in one rename once it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmvision_export.errors import OutputError

__all__ = ["new_directory", "new_files", "refuse_existing"]

# None is what NumPy and onnx-ir raise for a write that the disk took only a part of.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None}


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    Args:
        path: Where the directory shall be; a symbolic link stands for what it points to. Missing parents are made.
        marker: A file that every directory of this kind has. One without it is somebody else's, and never replaced.
        force: Replace what is there; otherwise it is refused. The old directory stays until the new one is whole.

    Raises:
        OutputError: `path` exists and may not be replaced, or it cannot be written.
    """
    refuse_existing(path, marker=marker, force=force)
    if path.is_symlink():
        path = path.resolve()
    with _temporary_directory(path.parent, path.name) as temporary:
        yield temporary
        refuse_existing(path, marker=marker, force=force)  # it may have come into being meanwhile
        if not path.exists():
            temporary.rename(path)
            return
        old = temporary.with_suffix(".old")
        try:
            path.rename(old)
            temporary.rename(path)
        except BaseException:
            if not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path, *, name: str) -> Iterator[Path]:
    """A temporary directory whose files move into `folder`, replacing their namesakes, when the block ends well.

    Args:
        folder: Where the files go. Missing folders are made.
        name: What is being written, for an error's message.

    Raises:
        OutputError: The files cannot be written.
    """
    with _temporary_directory(folder, name) as temporary:
        yield temporary
        # The largest first: a weight file before the graph that points into it.
        for file in sorted(temporary.iterdir(), key=lambda f: -f.stat().st_size):
            file.replace(folder / file.name)


def refuse_existing(path: Path, *, marker: str, force: bool) -> None:
    """Raise `OutputError` if `path` exists and `new_directory` would not replace it."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(f"{path} already exists", hint="choose another --output, or replace it with --force")
    if not (path / marker).is_file():
        raise OutputError(
            f"{path} has no {marker}: --force replaces model directories only", hint="choose another --output"
        )


@contextlib.contextmanager
def _temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    temporary: Path | None = None
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new.", suffix=".partial", dir=parent))
        # mkdtemp makes a private directory; what takes a public place gets the permissions of any new directory.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutputError(
                f"{parent}: no space left while writing {name}", hint="free some space; nothing was kept"
            ) from error
        raise OutputError(f"{parent}: cannot write {name}: {error.strerror}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            # Empty only if the block failed.
            with contextlib.suppress(OSError):
                folder.rmdir()
