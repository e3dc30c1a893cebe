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

__all__ = ["STANDARD_INPUT", "expanded", "from_standard_input"]

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
