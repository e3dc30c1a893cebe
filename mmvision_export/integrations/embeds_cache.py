"""A bounded cache of embeddings: in memory, on the disk, or both.

```python
cache = EmbedsCache(memory_bytes=1 << 30, folder=Path("embeds"), disk_bytes=20 << 30)
```

A cache never makes an encoder fail. An entry that cannot be written is counted and left out. A
damaged entry counts as missing.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

from mmvision_export.core.errors import ConfigError, InputError, OutputError
from mmvision_export.integrations.disk_embeds import DiskEmbeds
from mmvision_export.integrations.image_embeds import ImageEmbeds

__all__ = ["DISK_BYTES", "CacheCounts", "EmbedsCache"]

_MEMORY_BYTES = 1 << 30
DISK_BYTES = 16 << 30


@dataclasses.dataclass(frozen=True)
class CacheCounts:
    """Counts of a cache's hits, misses and failures so far, in this process.

    Attributes:
        memory_hits: Found in memory.
        disk_hits: Found on the disk.
        misses: Not found; `damaged` is among them.
        damaged: Found on the disk, not as written, and removed.
        unwritten: Writes that failed, as on a full disk.
    """

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    damaged: int = 0
    unwritten: int = 0


class EmbedsCache:
    """Embeddings by key. Safe for use by several threads; the folder by several processes."""

    def __init__(
        self,
        *,
        memory_bytes: int = _MEMORY_BYTES,
        folder: str | Path | None = None,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        """Open the folder, if there is one.

        Args:
            memory_bytes: Most bytes in memory; 0 for none.
            folder: Where entries are kept on the disk, or None.
            disk_bytes: Most bytes there. Processes that share a folder should agree on it: each
                keeps its own bound when it writes.

        Raises:
            ConfigError: A bound is out of range, or nothing would be kept anywhere.
            OutputError: The folder cannot be written to.
        """
        if memory_bytes < 0:
            raise ConfigError(f"memory_bytes must not be negative, got {memory_bytes}")
        if memory_bytes == 0 and folder is None:
            raise ConfigError(
                "a cache with memory_bytes 0 and no folder keeps nothing",
                hint="leave the cache out, or give it a folder",
            )
        self._memory_bytes = memory_bytes
        self._disk = None if folder is None else DiskEmbeds(Path(folder), max_bytes=disk_bytes)
        self._entries: collections.OrderedDict[str, ImageEmbeds] = collections.OrderedDict()
        self._held_bytes = 0
        self._counts = CacheCounts()
        self._lock = threading.Lock()

    @property
    def counts(self) -> CacheCounts:
        """Hits, misses and failures of this object so far."""
        return self._counts

    @property
    def held_bytes(self) -> int:
        """Bytes of embeddings in memory."""
        return self._held_bytes

    def get(self, key: str) -> ImageEmbeds | None:
        """The embeddings of a key; None if the cache has none."""
        with self._lock:
            if (found := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                self._count(memory_hits=1)
                return found
        damaged = 0
        if self._disk is not None:
            try:
                found = self._disk.read(key)
            except InputError:
                damaged = 1
        with self._lock:
            if found is None:
                self._count(misses=1, damaged=damaged)
            else:
                self._count(disk_hits=1)
                self._keep(key, found)
        return found

    def put(self, entries: Mapping[str, ImageEmbeds]) -> None:
        """Keep embeddings. Drop the least recently used ones if room is needed."""
        with self._lock:
            for key, embeds in entries.items():
                self._keep(key, embeds)
        if self._disk is None:
            return
        try:
            self._disk.write(entries)
        except OutputError:
            with self._lock:
                self._count(unwritten=1)

    def _keep(self, key: str, embeds: ImageEmbeds) -> None:
        if embeds.size_bytes > self._memory_bytes:
            return
        before = self._entries.pop(key, None)
        self._held_bytes += embeds.size_bytes - (before.size_bytes if before is not None else 0)
        self._entries[key] = embeds
        while self._held_bytes > self._memory_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._held_bytes -= dropped.size_bytes

    def _count(self, **more: int) -> None:
        self._counts = dataclasses.replace(
            self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()}
        )
