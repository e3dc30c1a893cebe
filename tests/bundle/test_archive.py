"""Every byte of an archive follows from its content: tar reads it, and one that is wrong is named."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmvision_export.bundle.archive import archive_problems, write_archive
from mmvision_export.bundle.record import BUNDLE, BundleRecord
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.core.files import FileRecord
from tests.support.bundles import bundle_record
from tests.support.errors import refused

CONTENT = {
    "README.txt": b"words\n",
    "install.sh": b"#!/bin/sh\n",
    "model/empty.npy": b"",
    "model/weights.data": np.random.default_rng(0).bytes(3000),
    "model/plans/" + "a" * 120 + ".engine": bytes(512),
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    write_archive(path, "x", bundle_record(CONTENT), dict(CONTENT))
    return path


def owners(path: Path) -> list[str]:
    """For each byte of an archive, the file that it is of."""
    names = [path.name] * path.stat().st_size
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    begins = [member.offset for member in members]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    for member, begin, stop in zip(members, begins, [*begins[1:], end], strict=True):
        names[begin:stop] = [member.name.partition("/")[2]] * (stop - begin)
    return names


def test_tar_unpacks_what_was_packed(archive: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "xf", archive, "-C", tmp_path], check=True)
    for name, data in CONTENT.items():
        assert (tmp_path / "x" / name).read_bytes() == data
    assert (tmp_path / "x" / "install.sh").stat().st_mode & 0o111
    assert not (tmp_path / "x" / "README.txt").stat().st_mode & 0o111
    assert BundleRecord.read(tmp_path / "x") == bundle_record(CONTENT)


def test_what_is_whole_has_no_problems(archive: Path) -> None:
    record, problems = archive_problems(archive)
    assert record == bundle_record(CONTENT)
    assert problems == {}


def test_any_byte_that_is_flipped_is_named(archive: Path, tmp_path: Path) -> None:
    whole, names = archive.read_bytes(), owners(archive)
    changed = tmp_path / "changed.tar"
    for position in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        changed.write_bytes(damaged)
        _, problems = archive_problems(changed)
        expected = names[position] if names[position] != archive.name else changed.name
        assert list(problems) == [expected], position


@pytest.mark.parametrize("part", [0, 100, 600, 3000, 7000, -1, -600, -10000])
def test_an_archive_that_is_cut_short_is_not_whole(archive: Path, part: int) -> None:
    archive.write_bytes(archive.read_bytes()[:part])
    assert archive_problems(archive)[1]


def test_what_follows_the_end_is_named(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"more")
    assert list(archive_problems(archive)[1]) == [archive.name]


def test_a_file_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    record = bundle_record(CONTENT)
    with refused(ManifestError, "README.txt"):
        write_archive(tmp_path / "x.tar", "x", record, {**CONTENT, "README.txt": b"other\n"})


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a//b", "./a", "a/../b", "", BUNDLE, "a\\b", "a\0b", "a/"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with refused(ManifestError, reason="unsafe"):
        bundle_record({name: b""})


@pytest.mark.parametrize("size", [-1, (1 << 50) + 1, 1 << 200])
def test_sizes_that_no_file_has_are_refused(size: int) -> None:
    with refused(ManifestError, "x", size):
        dataclasses.replace(bundle_record({}), files={"x": FileRecord("0" * 64, size)})


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        info = tarfile.TarInfo("a/b")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    assert list(archive_problems(other)[1]) == [BUNDLE]
    other.write_bytes(b"")
    assert list(archive_problems(other)[1]) == [BUNDLE]
    with refused(InputError, reason="missing"):
        archive_problems(tmp_path / "missing.tar")


def test_a_record_in_another_layout_is_refused(archive: Path, tmp_path: Path) -> None:
    """Its content is the same, its bytes are not."""
    text = bundle_record(CONTENT).text
    BundleRecord.parsed(text, Path(BUNDLE))  # the control
    with refused(ManifestError, BUNDLE, reason="malformed"):
        BundleRecord.parsed(text.replace(b"  ", b"   ", 1), Path(BUNDLE))
