"""Embeddings in files of one folder, for several processes at once.

An entry is one file, `<key>.embeds`:

| bytes | what |
| --- | --- |
| 8 | `MMVEMB1` and a zero byte |
| 32 | SHA-256 of all that follows |
| 32 | the key |
| 20 | tokens, width, t, h, w: five uint32, little-endian |
| 2 x tokens x width | the bits of bfloat16, little-endian, row by row |

The hash covers the key, so that an entry under another entry's name is found as well as one that is
cut short or changed. It finds damage and mix-ups, not malice: whoever may write to the folder can
write a whole entry. The folder is private to its user when this module makes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmvision_export.core.atomic import locked_folder, new_files, refuse_unwritable
from mmvision_export.core.errors import ConfigError, InputError, OutputError
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.core.user_folders import private_folder
from mmvision_export.integrations.image_embeds import ImageEmbeds

__all__ = ["DiskEmbeds"]

_MAGIC = b"MMVEMB1\0"
_SHAPE = struct.Struct("<5I")
_HEADER_BYTES = len(_MAGIC) + 32 + 32 + _SHAPE.size
_SUFFIX = ".embeds"


class DiskEmbeds:
    """A bounded folder of entries, the least recently used removed first.

    Safe for use by several threads and processes: entries are written whole or not at all, and
    whoever writes holds the folder's lock while room is made.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Make the folder if it is missing.

        Args:
            folder: Where the entries are.
            max_bytes: Most bytes of all entries together.

        Raises:
            ConfigError: `max_bytes` is not positive.
            OutputError: Nothing can be written there.
        """
        if max_bytes < 1:
            raise ConfigError(f"max_bytes must be positive, got {max_bytes}")
        try:
            private_folder(folder)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
        refuse_unwritable(folder)
        self.folder = folder
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        """Where the entry of a key is."""
        return self.folder / f"{key}{_SUFFIX}"

    def read(self, key: str) -> ImageEmbeds | None:
        """An entry, checked; None if there is none.

        Raises:
            InputError: It is not what was written. It is removed.
        """
        path = self.path(key)
        try:
            with opened_regular_file(path) as file:
                embeds = _read(file, key)
        except InputError as error:
            if error.reason == "missing":
                return None
            # Removed, so that the next one who asks makes it anew. If another process has replaced
            # it meanwhile, a good entry goes, and is made once more.
            with contextlib.suppress(OSError):
                path.unlink()
            raise InputError(f"{path}: {error}", reason="malformed") from error
        with contextlib.suppress(OSError):  # removed meanwhile, or a folder that only serves
            os.utime(path)
        return embeds

    def write(self, entries: Mapping[str, ImageEmbeds]) -> None:
        """Add entries, and remove what was not used for longest where room is needed.

        An entry larger than the whole bound is left out, and so is one that is there and whole.

        Raises:
            OutputError: They cannot be written. What is there stays as it was.
        """
        # Under the lock the bound holds at every moment, the unfinished files included.
        with locked_folder(self.folder):
            kept: dict[str, ImageEmbeds] = {}
            size_bytes = 0
            for key, embeds in entries.items():
                entry_bytes = _HEADER_BYTES + embeds.size_bytes
                # Another process may have written this entry while this one waited for the lock.
                # Room for the same entry once more would cost another entry its place.
                if size_bytes + entry_bytes <= self.max_bytes and not self._is_whole(key):
                    kept[key] = embeds
                    size_bytes += entry_bytes
            if not kept:
                return
            try:
                self._make_room(size_bytes)
            except OSError as error:
                raise OutputError(f"{self.folder}: cannot be read: {error.strerror}") from error
            with new_files(self.folder, name="cached embeddings") as new:
                for key, embeds in kept.items():
                    _write(new / f"{key}{_SUFFIX}", key, embeds)

    def size_bytes(self) -> int:
        """Of all entries together."""
        return sum(size for _, size, _ in self._entries())

    def _is_whole(self, key: str) -> bool:
        try:
            return self.read(key) is not None
        except InputError:
            return False  # damaged, and removed

    def _entries(self) -> list[tuple[int, int, str]]:
        """(time of last use in nanoseconds, bytes, path) of each."""
        entries = []
        with os.scandir(self.folder) as found:
            for each in found:
                if each.name.endswith(_SUFFIX):
                    with contextlib.suppress(OSError):  # removed meanwhile
                        status = each.stat(follow_symlinks=False)
                        entries.append((status.st_mtime_ns, status.st_size, each.path))
        return entries

    def _make_room(self, needed_bytes: int) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total + needed_bytes <= self.max_bytes:
                return
            with contextlib.suppress(OSError):
                Path(path).unlink()
                total -= size


def _write(path: Path, key: str, embeds: ImageEmbeds) -> None:
    body = bytes.fromhex(key) + _SHAPE.pack(*embeds.shape, *embeds.grid_thw)
    values = embeds.bits.astype("<u2", copy=False).data.cast("B")
    digest = hashlib.sha256(body)
    digest.update(values)
    with path.open("wb") as file:
        file.write(_MAGIC + digest.digest() + body)
        file.write(values)


def _read(file: BinaryIO, key: str) -> ImageEmbeds:
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise InputError("not an entry of this form")
    stored, body = header[8:40], header[40:]
    tokens, width, *row = _SHAPE.unpack(body[32:])
    if not tokens * width:
        raise InputError(f"says {tokens} tokens of width {width}")
    # Before memory is taken for what the header says.
    expected = _HEADER_BYTES + 2 * tokens * width
    if (size := os.fstat(file.fileno()).st_size) != expected:
        raise InputError(f"has {size} bytes, its header says {expected}")
    if body[:32] != bytes.fromhex(key):
        raise InputError("is the entry of another key")
    bits = np.empty((tokens, width), dtype="<u2")
    values = bits.data.cast("B")
    if file.readinto(values) != bits.nbytes:  # type: ignore[attr-defined]
        raise InputError("was cut short while it was read")
    digest = hashlib.sha256(body)
    digest.update(values)
    if digest.digest() != stored:
        raise InputError("its content does not have the hash that it was written with")
    t, h, w = row
    return ImageEmbeds(bits.astype(np.uint16, copy=False), (t, h, w))
