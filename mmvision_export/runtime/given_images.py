"""Images as a command line names them: files, patterns, and standard input."""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmvision_export.core.errors import InputError

__all__ = ["STANDARD_INPUT", "expanded", "files_of", "from_standard_input"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
"""Of files that count as images where a folder is given."""

STANDARD_INPUT = Path("-")


def expanded(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, with what a pattern as `photos/*.jpg` matches in its place, by name.

    A shell expands patterns itself unless they are quoted. A file whose own name has the
    characters of a pattern is that file.
    """
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            yield path
        else:
            yield from map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The image files of these files, patterns and folders; of a folder those it holds, by name.

    Raises:
        InputError: A folder has no images, or cannot be read.
    """
    found: list[Path] = []
    for path in expanded(paths):
        if not path.is_dir():
            found.append(path)
            continue
        try:
            names = sorted(path.iterdir())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}", reason="unreadable") from error
        images = [file for file in names if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not images:
            raise InputError(
                f"{path} has no images ({', '.join(SUFFIXES)})",
                hint=f"quote a pattern for its sub-folders: '{path}/**/*.jpg'",
                reason="missing",
            )
        found += images
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def from_standard_input(paths: Sequence[Path] | None) -> Iterator[list[Path]]:
    """The paths, with a file that holds standard input in the place of `-`.

    Raises:
        InputError: Standard input is a terminal, or empty.
    """
    if not paths or STANDARD_INPUT not in paths:
        yield list(paths or ())
        return
    if sys.stdin.isatty():
        raise InputError("--image - reads an image from standard input, which is a terminal")
    # Decoders seek. The file is named after what messages shall say.
    with tempfile.TemporaryDirectory(prefix="mmvision-") as folder:
        file = Path(folder, "standard input")
        with file.open("wb") as target:
            shutil.copyfileobj(sys.stdin.buffer, target)
        if not file.stat().st_size:
            raise InputError("--image - found nothing on standard input")
        yield [file if path == STANDARD_INPUT else path for path in paths]
