"""Opening what was given from outside: regular files only, and never a wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mmvision_export.core import regular_file
from mmvision_export.core.errors import InputError
from mmvision_export.core.regular_file import opened_regular_file
from tests.support.errors import refused
from tests.support.hostile_images import fifo


def test_a_regular_file_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with opened_regular_file(tmp_path / name) as file:
            assert file.read() == b"content"


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg"))
    path.write_bytes(b"content")
    with opened_regular_file(path) as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "link to a fifo"])
def test_anything_else_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    server = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        fifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        fifo(tmp_path / "y")
        path.symlink_to("y")
    with server, refused(InputError, path, reason="unsafe"):
        opened_regular_file(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with refused(InputError, tmp_path / "x", reason="missing"):
        opened_regular_file(tmp_path / "x")
    with refused(InputError, "x" * 300, reason="unreadable"):
        opened_regular_file(tmp_path / ("x" * 300))


def test_a_name_that_changes_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that takes the file's place after it was looked at is not read either."""
    path = tmp_path / "x"
    path.write_bytes(b"content")
    look = regular_file._refuse_irregular

    def swapped(name: Path, status: os.stat_result) -> None:
        look(name, status)
        path.unlink()
        fifo(path)

    monkeypatch.setattr(regular_file, "_refuse_irregular", swapped)
    with refused(InputError, path, reason="unsafe"):
        opened_regular_file(path)
