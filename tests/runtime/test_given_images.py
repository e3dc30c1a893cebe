"""Images as a command line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmvision_export.core.errors import InputError
from mmvision_export.runtime.given_images import files_of
from tests.support.errors import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "below/c.jpg", "x[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["."], ["a.PNG", "b.jpg", "x[1].jpg"]),
        (["b.jpg", "."], ["b.jpg", "a.PNG", "x[1].jpg"]),
        (["*.jpg"], ["b.jpg", "x[1].jpg"]),
        (["**/*.jpg"], ["b.jpg", "below/c.jpg", "x[1].jpg"]),
        (["x[1].jpg"], ["x[1].jpg"]),
        (["b.jpg", "b.jpg"], ["b.jpg"]),
        (["notes.txt", "nope.jpg"], ["notes.txt", "nope.jpg"]),
        (["*.tif"], []),
    ],
)
def test_files_folders_and_patterns(folder: Path, given: list[str], found: list[str]) -> None:
    assert files_of([folder / name for name in given]) == [folder / name for name in found]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with refused(InputError, tmp_path, ".png", reason="missing"):
        files_of([tmp_path])
