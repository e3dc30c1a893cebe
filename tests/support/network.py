"""A Python process whose network calls are noted and refused, its home and cache empty."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.tools import once, tool

__all__ = ["Watched", "network_watch", "watched"]

_SOURCE = Path(__file__).with_name("refuse_network.c")
# Set, they turn OpenVINO's telemetry off by themselves.
_MARKS_OF_CI = ("CI", "TF_BUILD", "JENKINS_URL")


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a process did.

    Attributes:
        calls: Its network calls, as `socket 2` or `getaddrinfo example.com`.
        files: What it left under its home and its cache, relative to their common folder, but for
            our own folder there.
        code: Exit code.
        err: Standard error.
    """

    calls: list[str]
    files: list[str]
    code: int
    err: str


def network_watch(folder: Path) -> Path:
    """The library that is preloaded, compiled once; skips where nothing can be preloaded."""
    if sys.platform != "linux":
        pytest.skip("native network calls are watched by LD_PRELOAD, which is Linux's")
    compiler = tool("g++", "g++")

    def make(new: Path) -> None:
        command = [compiler, "-x", "c", "-shared", "-fPIC", "-Wall", "-Werror"]
        subprocess.run([*command, str(_SOURCE), "-o", str(new / "watch.so")], check=True)

    return once(folder / "network_watch", make) / "watch.so"


def watched(
    library: Path, code: str, *arguments: str | Path, environment: Sequence[tuple[str, str]] = ()
) -> Watched:
    """Run a piece of Python in a process of its own, and say what it did.

    Args:
        library: From `network_watch`.
        code: The program.
        arguments: Its `sys.argv[1:]`.
        environment: Variables on top of this process's, from which CI's own are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("home", "cache"):
            (root / name).mkdir()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in (*_MARKS_OF_CI, "ORT_DISABLE_TELEMETRY")
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={
                **inherited,
                "HOME": str(root / "home"),
                "XDG_CACHE_HOME": str(root / "cache"),
                "LD_PRELOAD": str(library),
                "NETWORK_LOG": str(root / "log"),
                **dict(environment),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        log = root / "log"
        # What is verified and compiled is remembered in a folder of our own.
        found = (
            path
            for path in root.rglob("*")
            if path.is_file() and path != log and "mmvision-export" not in path.parts
        )
        return Watched(
            calls=log.read_text(encoding="utf-8").splitlines() if log.exists() else [],
            files=sorted(str(path.relative_to(root)) for path in found),
            code=done.returncode,
            err=done.stderr,
        )
