"""The user's own folders: settings, and what can be made again.

References:
    https://specifications.freedesktop.org/basedir-spec/latest/
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "config_folder", "private_folder"]

_NAME = "mmvision-export"


def config_folder() -> Path | None:
    """Where records of this user's builds are; None for a user without a home folder."""
    return _folder("XDG_CONFIG_HOME", ".config")


def cache_folder() -> Path | None:
    """Where compiled kernels, timings and verified files are kept; None as for `config_folder`."""
    return _folder("XDG_CACHE_HOME", ".cache")


def private_folder(folder: Path) -> Path:
    """A folder that only this user can read, made with its parents if it is missing.

    Raises:
        OSError: It cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _folder(variable: str, below_home: str) -> Path | None:
    given = Path(os.environ.get(variable, ""))
    # The specification: "If an implementation encounters a relative path in any of these variables
    # it should consider the path invalid and ignore it."
    if given.is_absolute():
        return given / _NAME
    try:
        return Path.home() / below_home / _NAME
    except RuntimeError:  # no HOME, and no entry for this user id, as in some containers
        return None
