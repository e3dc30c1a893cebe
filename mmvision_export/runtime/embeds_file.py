"""Embeddings to a file, image by image, so that memory holds no more than one.

.npy, .safetensors or JSON lines.

| file | holds |
| --- | --- |
| `.npy` | `[tokens, text_hidden_size]`, all images in order; of a video with `NAME.npy.json` beside it |
| `.safetensors` | `image_embeds` as in `.npy`, `grid_thw` `[num_images, 3]`; metadata: inputs, a video's timestamps |
| `.jsonl` | one line for each image or segment: its input, grid row, timestamps and embeddings |
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import InputError, OutputError
from mmvision_export.core.files import json_from_file

__all__ = [
    "FORMATS",
    "EmbedsFile",
    "companion_of",
    "embeds_file",
    "refuse_existing_file",
    "refuse_unknown_format",
]

FORMATS = ("npy", "safetensors", "jsonl")
_COMPANION = {"inputs", "grid_thw", "timestamps"}
_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


class EmbedsFile:
    """A file being written; made by `embeds_file`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._target = folder / name
        self._rows: list[tuple[int, int, int]] = []
        self._inputs: list[str] = []
        self._timestamps: list[list[float]] = []
        self._dtype = np.dtype(np.float32)
        self._width = 0
        # What a header says is known only at the end: the values are collected in a file of their
        # own until then. Its name is short: theirs may be as long as names can be.
        self._data = (folder / ".data").open("w+b")

    def add(
        self,
        source: str,
        grid_thw: tuple[int, int, int],
        image_embeds: npt.NDArray[np.floating],
        timestamps: tuple[float, ...] | None = None,
    ) -> None:
        """Append one image or segment.

        Args:
            source: Where it comes from.
            grid_thw: Its grid row.
            image_embeds: `[tokens, text_hidden_size]`.
            timestamps: Seconds of its temporal patches, of a video.
        """
        self._rows.append(grid_thw)
        self._inputs.append(source)
        if timestamps is not None:
            self._timestamps.append(list(timestamps))
        self._dtype, self._width = image_embeds.dtype, image_embeds.shape[1]
        if self._target.suffix != ".jsonl":
            image_embeds.tofile(self._data)
            return
        line: dict[str, Any] = {"input": source, "grid_thw": list(grid_thw)}
        if timestamps is not None:
            line["timestamps"] = list(timestamps)
        line["image_embeds"] = image_embeds.tolist()
        self._data.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def finish(self) -> None:
        """Write the file itself."""
        size = self._data.tell()
        self._data.seek(0)
        tokens = size // (self._width * self._dtype.itemsize) if self._width else 0
        with self._target.open("wb") as file:
            if self._target.suffix == ".npy":
                header = {
                    "descr": self._dtype.str,
                    "fortran_order": False,
                    "shape": (tokens, self._width),
                }
                np.lib.format.write_array_header_1_0(file, header)
            elif self._target.suffix == ".safetensors":
                grid = np.array(self._rows, dtype=np.int64)
                file.write(self._safetensors_header((tokens, self._width), size, grid))
            shutil.copyfileobj(self._data, file)
            if self._target.suffix == ".safetensors":
                file.write(grid.tobytes())
        if self._timestamps and self._target.suffix == ".npy":
            companion = {
                "inputs": self._inputs,
                "grid_thw": [list(row) for row in self._rows],
                "timestamps": self._timestamps,
            }
            text = json.dumps(companion) + "\n"
            companion_of(self._target).write_text(text, encoding="utf-8")

    def _safetensors_header(
        self, shape: tuple[int, int], size: int, grid: npt.NDArray[np.int64]
    ) -> bytes:
        """See https://huggingface.co/docs/safetensors/index#format."""
        header = {
            "__metadata__": {
                "inputs": json.dumps(self._inputs),
                **({"timestamps": json.dumps(self._timestamps)} if self._timestamps else {}),
            },
            "image_embeds": {
                "dtype": _SAFETENSORS_TYPES[self._dtype.name],
                "shape": list(shape),
                "data_offsets": [0, size],
            },
            "grid_thw": {
                "dtype": "I64",
                "shape": list(grid.shape),
                "data_offsets": [size, size + grid.nbytes],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
        return struct.pack("<Q", len(text)) + text

    def close(self) -> None:
        """Drop what was collected."""
        self._data.close()
        with contextlib.suppress(FileNotFoundError):
            Path(self._data.name).unlink()


def companion_of(path: Path) -> Path:
    """The file beside a video's `.npy` that has its segments' grid rows and timestamps, as JSON."""
    return path.with_name(f"{path.name}.json")


def refuse_existing_file(path: Path, *, of_a_video: bool) -> None:
    """Refuse to replace embeddings, or a file of another kind that lies where the companion goes.

    A companion without embeddings is what a killed run left: the embeddings move into place last.

    Raises:
        OutputError: Names the file that is there.
    """
    found = path if path.exists() else None
    if found is None and of_a_video and path.suffix == ".npy":
        companion = companion_of(path)
        if companion.exists() and not _is_companion(companion):
            found = companion
    if found is not None:
        raise OutputError(
            f"{found} already exists", hint="choose another --output, or replace it with --force"
        )


def _is_companion(path: Path) -> bool:
    try:
        content = json_from_file(path)
    except InputError:
        return False
    return isinstance(content, dict) and set(content) == _COMPANION


def refuse_unknown_format(path: Path) -> None:
    """Refuse a file whose suffix is none of `FORMATS`.

    Raises:
        OutputError: Names it.
    """
    if path.suffix.removeprefix(".") not in FORMATS:
        raise OutputError(f"--output must end in .npy, .safetensors or .jsonl, got {path}")


@contextlib.contextmanager
def embeds_file(path: Path) -> Iterator[EmbedsFile]:
    """A file that is there, whole, when the block ends without an error, and not at all otherwise.

    Raises:
        OutputError: The suffix is unknown, or the file cannot be written.
    """
    refuse_unknown_format(path)
    with new_files(path.parent, name=path.name, last=path.name) as new:
        file = EmbedsFile(new, path.name)
        try:
            yield file
            file.finish()
        finally:
            file.close()
