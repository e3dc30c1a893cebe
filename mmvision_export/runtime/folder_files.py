"""Which files a run over folders encodes, and what their embeddings are called."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmvision_export.core.errors import InputError

__all__ = ["FolderFile", "FolderFiles", "files_below", "output_path"]

_MOST_NAME_BYTES = 240  # of 255, for what is added to a name while the file is written
_KEPT_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True)
class FolderFile:
    """One file to encode.

    Attributes:
        source: Where it is.
        name: What its output is named after: its path below the folder that was given.
    """

    source: Path
    name: Path


@dataclasses.dataclass(frozen=True)
class FolderFiles:
    """All files to encode, and what is not looked into.

    Attributes:
        files: In the order of the inputs, each folder's by name.
        unreadable: Folders, with the reason.
        linked: Links to folders, which are not followed: they may lead back.
    """

    files: tuple[FolderFile, ...]
    unreadable: tuple[tuple[Path, str], ...]
    linked: tuple[Path, ...]


def files_below(inputs: Sequence[Path]) -> FolderFiles:
    """Every file of these files and folders, and of all folders below, hidden ones excepted.

    A file that is given twice, by the same path, counts once.

    Raises:
        InputError: Two files would have one output.
    """
    unreadable: list[tuple[Path, str]] = []
    linked: list[Path] = []
    by_name: dict[Path, Path] = {}
    for path in inputs:
        for file in _walked(path, unreadable, linked):
            earlier = by_name.setdefault(file.name, file.source)
            if earlier.absolute() != file.source.absolute():
                raise InputError(
                    f"{earlier} and {file.source} would have the same output, {file.name}",
                    hint="encode them into different folders, or give a folder that holds both",
                    reason="exists",
                )
    files = tuple(FolderFile(source, name) for name, source in by_name.items())
    return FolderFiles(files, tuple(unreadable), tuple(linked))


def output_path(output: Path, name: Path, form: str) -> Path:
    """Where the embeddings of a file of this name go.

    Its name with the format appended; a name that is then too long for a file system is cut and has
    its hash appended first.
    """
    last = f"{name.name}.{form}"
    if len(os.fsencode(last)) > _MOST_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(name.name)).hexdigest()[:16]
        kept = name.name
        while len(os.fsencode(kept)) > _KEPT_NAME_BYTES:
            kept = kept[:-1]
        last = f"{kept}~{digest}.{form}"
    return output / name.parent / last


def _walked(
    path: Path, unreadable: list[tuple[Path, str]], linked: list[Path]
) -> Iterator[FolderFile]:
    if not path.is_dir():
        yield FolderFile(path, Path(path.name))
        return

    def note(error: OSError) -> None:
        unreadable.append((Path(error.filename), error.strerror or str(error)))

    for folder, below, names in os.walk(path, onerror=note):
        below[:] = sorted(name for name in below if not name.startswith("."))
        linked += [link for name in below if (link := Path(folder, name)).is_symlink()]
        for name in sorted(names):
            if not name.startswith("."):
                file = Path(folder, name)
                yield FolderFile(file, file.relative_to(path))
