"""What tests of compiled libraries need: a tool of the system, and a folder made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def tool(name: str, package: str) -> str:
    """The path of a tool; without it a test is skipped, but in CI, which installs it, failed."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def once(root: Path, make: Callable[[Path], object]) -> Path:
    """A folder made once for all of pytest's worker processes."""
    with filelock.FileLock(f"{root}.lock"):
        if not root.exists():
            new = root.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            make(new)
            new.rename(root)
    return root
