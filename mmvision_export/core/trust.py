"""Which engines and libraries are loaded: those that this user built, named, or trusts.

A graph, weights and JSON are data, and may be opened from anybody. An engine and a library are
code: loading one runs what its maker chose. A hash that lies beside a file says that the file is
whole, and nothing about its maker. So code is loaded only where

* the file and its folder belong to this user or to root, and nobody else can write to them; and
* this user built it, as a record in the user's own settings says, or named the file, or said that
  this folder is trusted.

A record is by the file's hash, so that what was built here may be moved and copied.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import ManifestError, OutputError
from mmvision_export.core.user_folders import config_folder, private_folder

__all__ = ["UntrustedError", "is_built_here", "record_built", "refuse_untrusted"]

_ROOT = 0
_RECORDS = "built"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UntrustedError(ManifestError):
    """A file is code that this user has neither built nor named."""


def record_built(sha256: str, path: Path) -> str | None:
    """Remember that this user built a file, or chose it for a build.

    Args:
        sha256: Its hash.
        path: Where it lies, for whoever reads the record.

    Returns:
        None, or why it could not be remembered: the file will have to be named or trusted.
    """
    folder = config_folder()
    if folder is None:
        return "this user has no home folder for the record of it"
    try:
        private_folder(folder / _RECORDS)
        with new_files(folder / _RECORDS, name=sha256) as new:
            (new / sha256).write_text(f"{path.resolve()}\n", encoding="utf-8", errors="replace")
    except (OSError, OutputError) as error:
        return f"the record of it could not be written: {error}"
    return None


def is_built_here(sha256: str) -> bool:
    """Whether this user's settings have a record of a file with this hash."""
    folder = config_folder()
    # The hash is from a file that anybody may have written: a path in its place would find a file.
    if folder is None or not _SHA256.fullmatch(sha256):
        return False
    record = folder / _RECORDS / sha256
    try:
        # A record that others could have written says nothing.
        return record.is_file() and _owner_problem(record) is None
    except OSError:
        return False


def refuse_untrusted(path: Path, sha256: str, *, named: bool) -> None:
    """Refuse a file of code that this user does not trust.

    Args:
        path: The file.
        sha256: Its hash; the caller verifies it on the bytes that it loads.
        named: Whether the user named this file, or trusts the folder that it was found in.

    Raises:
        UntrustedError: Others can write to it, or nobody vouches for it.
    """
    problem = _owner_problem(path)
    if problem is not None:
        raise UntrustedError(
            f"{path} is executable content, and {problem}",
            hint="copy it into a folder that only you can write to",
            reason="unsafe",
        )
    if not (named or is_built_here(sha256)):
        raise UntrustedError(
            f"{path} is executable content that this user has not built here",
            hint="if you trust its maker, name the file itself, or open with --trust (trust=True)",
            reason="unsafe",
        )


def _owner_problem(path: Path) -> str | None:
    """Who besides this user and root could have put a file there."""
    if not hasattr(os, "geteuid"):  # Windows has no such owners
        return None
    file = path.resolve()
    for each in (file, file.parent):
        try:
            status = each.stat()
        except OSError as error:
            return f"its owner cannot be read: {error.strerror}"
        if status.st_uid not in (os.geteuid(), _ROOT):
            return f"{each} belongs to another user (uid {status.st_uid})"
        # In a sticky folder, as /tmp, only its owner can replace a file.
        is_sticky_folder = stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)
        if is_sticky_folder:
            continue
        if status.st_mode & stat.S_IWOTH:
            return f"everybody can write to {each}"
        if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid):
            return f"the group {status.st_gid} can write to {each}"
    return None


def _is_private_group(gid: int) -> bool:
    """Whether nobody but this user is in a group: Debian gives each user one, and umask 002."""
    if gid == _ROOT:
        return True
    with contextlib.suppress(ImportError, KeyError, OSError):
        import grp
        import pwd

        name = pwd.getpwuid(os.geteuid()).pw_name
        members = set(grp.getgrgid(gid).gr_mem)
        members |= {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == gid}
        return members <= {name, "root"}
    return False
