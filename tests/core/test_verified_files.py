"""Large files are hashed once: `core.verified_files`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmvision_export.core import verified_files
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord, file_record
from mmvision_export.core.progress import Progress
from mmvision_export.core.verified_files import Verify, remember_verified, verify_file


class Hashing(Progress):
    """Counts how often a file is read."""

    def __init__(self) -> None:
        self.begun = 0
        self.megabytes = 0.0

    def step(self, description: str, total: float | None = None) -> None:
        self.begun += 1

    def advance(self, amount: float = 1.0) -> None:
        self.megabytes += amount


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(100_000))
    return file


def times_hashed(record: FileRecord, file: Path, *, times: int, when: Verify = "once") -> int:
    progress = Hashing()
    for _ in range(times):
        verify_file(record, file, said_by="the test", when=when, progress=progress)
    assert progress.megabytes == pytest.approx(progress.begun * file.stat().st_size / 1e6)
    return progress.begun


@pytest.mark.parametrize(("when", "expected"), [("once", 1), ("always", 3), ("never", 0)])
def test_how_often_a_file_is_hashed(weights: Path, when: Verify, expected: int) -> None:
    assert times_hashed(file_record(weights), weights, times=3, when=when) == expected


def damage_in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(500)
        stream.write(b"\0\1\2")


def put_another_in_its_place(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    status = file.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [damage_in_place, put_another_in_its_place])
@pytest.mark.parametrize("when", ["once", "always"])
def test_a_change_of_the_same_size_is_noticed(weights: Path, change: object, when: Verify) -> None:
    record = file_record(weights)
    verify_file(record, weights, said_by="the test", when=when)
    change(weights)  # type: ignore[operator]
    with pytest.raises(ManifestError):
        verify_file(record, weights, said_by="the test", when=when)
    # The control: only the size is compared.
    verify_file(record, weights, said_by="the test", when="never")


def test_what_was_just_written_is_not_read_again(weights: Path) -> None:
    record = file_record(weights)
    remember_verified(weights, record.sha256)
    assert times_hashed(record, weights, times=2) == 0


def test_a_remembered_hash_is_compared_with_the_record(weights: Path) -> None:
    remember_verified(weights, file_record(weights).sha256)
    with pytest.raises(ManifestError):
        verify_file(FileRecord("0" * 64, weights.stat().st_size), weights, said_by="the test")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"size": 1}', b"\xff\xfe"])
def test_a_damaged_memory_is_no_memory(weights: Path, tmp_path: Path, content: bytes) -> None:
    record = file_record(weights)
    assert times_hashed(record, weights, times=1) == 1
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_bytes(content)
    assert times_hashed(record, weights, times=2) == 1


def test_where_nothing_can_be_remembered_each_opening_hashes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = file_record(weights)
    blocker = tmp_path / "blocker"
    blocker.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    assert times_hashed(record, weights, times=2) == 2
    monkeypatch.setattr(verified_files, "cache_folder", lambda: None)
    assert times_hashed(record, weights, times=2) == 2
