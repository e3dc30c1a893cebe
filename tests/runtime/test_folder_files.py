"""Which files a run over folders encodes, and where their outputs go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmvision_export.core.errors import InputError
from mmvision_export.runtime.folder_files import files_below, output_path
from tests.support.errors import refused


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_files_in_order_with_their_names(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", "b", "a/z", ".h", ".g/x"), made(tmp_path / "two", "c/y")
    listed = files_below([two, one, tmp_path / "one" / "b"])
    assert [(file.source, str(file.name)) for file in listed.files] == [
        (two / "c" / "y", "c/y"),
        (one / "b", "b"),
        (one / "a" / "z", "a/z"),
    ]
    assert (listed.unreadable, listed.linked) == ((), ())


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two = made(tmp_path / "c1", "d/x.png"), made(tmp_path / "c2", "d/x.png", "x.png")
    with refused(InputError, one / "d" / "x.png", two / "d" / "x.png", reason="exists"):
        files_below([one, two])
    assert len(files_below([tmp_path]).files) == 3
    assert len(files_below([one, one]).files) == 1
    with refused(InputError, two / "x.png", one / "d" / "x.png", reason="exists"):
        files_below([two, one / "d" / "x.png"])


def test_links_to_folders_are_told_and_not_followed(tmp_path: Path) -> None:
    made(tmp_path / "photos", "a")
    (tmp_path / "photos" / "again").symlink_to(".")
    (tmp_path / "photos" / "link-to-a").symlink_to("a")
    listed = files_below([tmp_path / "photos"])
    assert [file.name.name for file in listed.files] == ["a", "link-to-a"]
    assert listed.linked == (tmp_path / "photos" / "again",)


def test_unreadable_folders_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "photos/a", "photos/locked/b")
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)  # root reads every folder
    listed = files_below([tmp_path / "photos"])
    assert [file.name.name for file in listed.files] == ["a"]
    assert listed.unreadable == ((tmp_path / "photos" / "locked", "Permission denied"),)


@pytest.mark.parametrize("letter", ["x", "é", "\udcff"])
@pytest.mark.parametrize("length", [236, 237, 250, 255])
def test_names_of_any_length_have_an_output(letter: str, length: int, tmp_path: Path) -> None:
    """A name that the file system takes gives one that it takes, temporary names included."""
    name = letter * (length // len(os.fsencode(letter)))
    path = output_path(tmp_path, Path("more", name), "npy")
    assert path.parent == tmp_path / "more"
    assert len(os.fsencode(path.name)) <= 240
    assert path.suffix == ".npy"
    long = len(os.fsencode(name)) > 236
    assert (path.name == f"{name}.npy") is not long
    # Names that differ in what is cut have outputs of their own.
    other = output_path(tmp_path, Path("more", name[:-1] + "a"), "npy")
    assert other != path
