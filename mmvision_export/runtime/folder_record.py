"""What a folder of embeddings knows of itself: whose it is, and of what each file was made.

Two files beside the embeddings. `mmvision-run.json` says on what they depend but for the images. A
line of `mmvision-run.records` says for one of them which file it was made of, by path, size and time
of change, and how long it is; it is appended once the embeddings are in place. So an interrupted run
loses no more than the images in work, whenever it is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import OutputError
from mmvision_export.core.files import read_json

__all__ = ["FolderRecords", "refuse_foreign_output"]

_IDENTITY = "mmvision-run.json"
_RECORDS = "mmvision-run.records"
_FIRST_BYTES = {".npy": b"\x93NUMPY", ".jsonl": b'{"input"'}


def refuse_foreign_output(
    output: Path, inputs: Sequence[Path], identity: dict[str, Any], *, force: bool
) -> None:
    """Refuse to mix embeddings of two models in one folder, or with the images.

    Write down whose these are.

    Args:
        output: The folder of embeddings.
        inputs: Folders and files of images.
        identity: From `run_identity`.
        force: Whether to encode everything anew. What is recorded is forgotten.

    Raises:
        OutputError: The folder holds another model's embeddings, or something else, or lies among
            the images.
        ManifestError: What the folder says of itself is damaged.
    """
    if any(output.resolve().is_relative_to(path.resolve()) for path in inputs):
        raise OutputError(f"{output} lies in a folder of images", hint="choose another --output")
    mark = output / _IDENTITY
    # Through JSON, as it was written: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    if not force and output.exists():
        if not output.is_dir() or (not mark.is_file() and _holds_something(output)):
            raise OutputError(
                f"{output} is not a folder of embeddings", hint="choose another --output"
            )
        if mark.is_file():
            there = read_json(mark)
            if there == identity:
                return
            differing = ", ".join(name for name in identity if there.get(name) != identity[name])
            raise OutputError(
                f"{output} holds embeddings of another run: {differing} differs",
                hint="choose another --output, or encode everything again with --force",
            )
    if force:
        # Before the new mark: what is recorded must never be taken for another model's.
        (output / _RECORDS).unlink(missing_ok=True)
    with (
        new_files(output, name=_IDENTITY) as new,
        (new / _IDENTITY).open("w", encoding="utf-8") as file,
    ):
        file.write(json.dumps(identity, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _holds_something(output: Path) -> bool:
    """Whether there is more than what a killed run had begun to write."""
    return any(
        not (entry.name.startswith(".new.") and entry.name.endswith(".partial"))
        for entry in output.iterdir()
    )


class FolderRecords:
    """The records of one folder. One thread adds to them, several may ask."""

    def __init__(self, output: Path) -> None:
        """Read what is there; a line that was cut is left out.

        Raises:
            OutputError: The file of records cannot be opened.
        """
        self._output = output
        path = output / _RECORDS
        try:
            self._file = path.open("a+b")
            self._file.seek(0)
            content = self._file.read()
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened: {error.strerror}") from error
        self._records: dict[str, list[Any]] = {}
        for line in content.splitlines():
            try:
                name, *facts = json.loads(line)
                self._records[name] = facts
            except (ValueError, TypeError, RecursionError):
                continue
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def has(self, source: Path, status: os.stat_result, target: Path) -> bool:
        """Whether this output is there, whole, and of this file as it is now."""
        recorded = self._records.get(self._name(target))
        if recorded is None or recorded[:-1] != _facts(source, status):
            return False
        try:
            with target.open("rb") as file:
                return os.fstat(file.fileno()).st_size == recorded[-1] and _is_one(
                    target.suffix, file.read(16)
                )
        except OSError:
            return False

    def add(self, source: Path, status: os.stat_result, target: Path) -> None:
        """Record an output that is in place.

        Raises:
            OutputError: It cannot be written.
        """
        name, facts = self._name(target), [*_facts(source, status), target.stat().st_size]
        try:
            self._file.write(json.dumps([name, *facts]).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._file.name}: cannot be written: {error.strerror}") from error
        self._records[name] = facts

    def _name(self, target: Path) -> str:
        return target.relative_to(self._output).as_posix()

    def __enter__(self) -> FolderRecords:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _facts(source: Path, status: os.stat_result) -> list[Any]:
    return [str(source.absolute()), status.st_size, status.st_mtime_ns]


def _is_one(suffix: str, first: bytes) -> bool:
    """Whether a file of embeddings begins so."""
    if suffix == ".safetensors":  # the length of its header, then the header
        return first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 1 << 40
    return first.startswith(_FIRST_BYTES[suffix])
