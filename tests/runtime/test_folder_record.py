"""What a folder of embeddings records, and when that is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mmvision_export.core.errors import OutputError
from mmvision_export.runtime.embeds_file import FORMATS, embeds_file
from mmvision_export.runtime.folder_record import FolderRecords, refuse_foreign_output
from tests.support.errors import refused

IDENTITY = {"weights_sha256": "a", "sizes": (1, 2)}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "a.jpg"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    return path


def output_of(folder: Path, form: str) -> Path:
    with embeds_file(folder / f"a.jpg.{form}") as file:
        file.add("a.jpg", (1, 2, 2), np.ones((1, 8), np.float32))
    return folder / f"a.jpg.{form}"


@pytest.mark.parametrize("form", FORMATS)
def test_an_output_is_there_if_it_is_recorded_and_whole(
    form: str, photo: Path, tmp_path: Path
) -> None:
    output = output_of(tmp_path / "out", form)
    status = photo.stat()
    with FolderRecords(output.parent) as records:
        assert not records.has(photo, status, output)
        records.add(photo, status, output)
        assert records.has(photo, status, output)
    with FolderRecords(output.parent) as records:
        assert records.has(photo, status, output)
        # An older picture in its place, one of a later date, one of another length, another one.
        for change in (-(10**9), 10**9):
            os.utime(photo, ns=(0, status.st_mtime_ns + change))
            assert not records.has(photo, photo.stat(), output)
        photo.write_bytes(b"123456")
        os.utime(photo, ns=(0, status.st_mtime_ns))
        assert not records.has(photo, photo.stat(), output)
        assert not records.has(photo.with_name("b.jpg"), status, output)
        # The output cut short, overwritten, gone.
        content = output.read_bytes()
        output.write_bytes(content[:-1])
        assert not records.has(photo, status, output)
        output.write_bytes(bytes(len(content)))
        assert not records.has(photo, status, output)
        output.write_bytes(content)
        assert records.has(photo, status, output)
        output.unlink()
        assert not records.has(photo, status, output)


def test_a_line_that_was_cut_loses_itself_only(photo: Path, tmp_path: Path) -> None:
    output = output_of(tmp_path / "out", "npy")
    status = photo.stat()
    with FolderRecords(output.parent) as records:
        records.add(photo, status, output)
    path = output.parent / "mmvision-run.records"
    whole = path.read_bytes()
    for cut in (b'["b.jpg.npy", "/x", 1', b"[]\n", b"7\n", b"\xff\n", b'{"a": 1}\n', b"[[1], 2]\n"):
        path.write_bytes(whole + cut)
        with FolderRecords(output.parent) as records:
            assert records.has(photo, status, output)
            records.add(photo, status, output)
        path.write_bytes(cut + b"\n" * (not cut.endswith(b"\n")) + path.read_bytes()[-len(whole) :])
        with FolderRecords(output.parent) as records:
            assert records.has(photo, status, output)


def test_a_name_that_is_no_text_is_recorded(tmp_path: Path) -> None:
    photo = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))
    photo.write_bytes(b"12345")
    output = tmp_path / "out" / f"{photo.name}.npy"
    with embeds_file(output) as file:
        file.add(str(photo), (1, 2, 2), np.ones((1, 8), np.float32))
    with FolderRecords(output.parent) as records:
        records.add(photo, photo.stat(), output)
    with FolderRecords(output.parent) as records:
        assert records.has(photo, photo.stat(), output)


def test_a_killed_run_leaves_what_the_next_one_takes(photo: Path, tmp_path: Path) -> None:
    """Killed while the mark was written: a temporary folder is there, and no mark."""
    output = tmp_path / "out"
    (output / ".new.abc.partial").mkdir(parents=True)
    (output / ".new.abc.partial" / "mmvision-run.json").write_text("{")
    refuse_foreign_output(output, [photo.parent], IDENTITY, force=False)
    mark = output / "mmvision-run.json"
    assert json.loads(mark.read_text()) == {"weights_sha256": "a", "sizes": [1, 2]}
    before = mark.stat().st_ino
    refuse_foreign_output(output, [photo.parent], IDENTITY, force=False)
    assert mark.stat().st_ino == before  # it is not written again
    # The control: anything else makes it somebody's folder.
    mark.unlink()
    (output / "letter.txt").write_text("")
    with refused(OutputError, output):
        refuse_foreign_output(output, [photo.parent], IDENTITY, force=False)


def test_force_forgets_what_was_of_another_model(photo: Path, tmp_path: Path) -> None:
    refuse_foreign_output(tmp_path / "out", [photo.parent], IDENTITY, force=False)
    output = output_of(tmp_path / "out", "npy")
    with FolderRecords(output.parent) as records:
        records.add(photo, photo.stat(), output)
    other = {**IDENTITY, "weights_sha256": "b"}
    with refused(OutputError, output.parent, "weights_sha256"):
        refuse_foreign_output(output.parent, [photo.parent], other, force=False)
    refuse_foreign_output(output.parent, [photo.parent], other, force=True)
    with FolderRecords(output.parent) as records:
        assert not records.has(photo, photo.stat(), output)
