"""What is to be embedded: rows with an id each, cut into parts that are done one by one.

The same input gives the same parts. A part is what a killed run does again, and what a worker takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mmvision_export.models.minimax_m3_vl.images import EncodedImage

__all__ = ["Listing", "Part", "Row", "utf8"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One image to embed.

    Attributes:
        id: What it is called in the tables.
        source: Its file; None where there is none to decode.
        error: Why there is none.
    """

    id: str
    source: Path | EncodedImage | None
    error: str | None = None


class Part(Protocol):
    """Consecutive rows of the input. It can be pickled.

    Attributes:
        index: Its number, from 0 on.
        num_rows: How many rows it has.
    """

    @property
    def index(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    def rows(self) -> Iterator[Row]:
        """The rows in order, each read when it is asked for.

        Raises:
            InputError: What holds the rows cannot be read any more.
        """


@dataclasses.dataclass(frozen=True)
class Listing:
    """All rows of an input.

    Attributes:
        name: The input as it was given.
        parts: In order.
        sha256: Of names, sizes and times of change: another input has another.
        notes: What was left out, for people.
    """

    name: str
    parts: Sequence[Part]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows, all parts together."""
        return sum(part.num_rows for part in self.parts)


def utf8(name: str) -> str:
    """A file's name, or what names one, for a table: it holds UTF-8, and a name may hold any bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
