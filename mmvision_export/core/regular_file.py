"""Files given from outside are opened as what they are, or refused.

A FIFO would block for ever, and a device may do anything when it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmvision_export.core.errors import InputError

__all__ = ["opened_regular_file"]

# Windows has neither flag, and opens in text mode where it is not told.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def opened_regular_file(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        InputError: The file is missing, cannot be opened, or is a folder, FIFO, socket or device.
    """
    try:
        # Asked before it is opened, because opening alone moves some devices; and again after, in
        # case another file took the name meanwhile.
        _refuse_irregular(path, path.stat())
        file = open(path, "rb", opener=_opened)  # noqa: SIM115 - `Path.open` has no opener
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", reason="missing") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be opened: {reason}", reason="unreadable") from error
    try:
        _refuse_irregular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _opened(path: str, flags: int) -> int:
    return os.open(path, _FLAGS)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file", reason="unsafe")
