"""Rows of Parquet files that hold encoded images.

A part is one or more whole row groups of one file, so that no row group is read twice. A row group
of more rows than a part should have is a part of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from mmvision_export.core.errors import InputError
from mmvision_export.embed.arrow import file_system, required_pyarrow
from mmvision_export.embed.files import MAX_ENCODED_BYTES
from mmvision_export.embed.listing import Listing, Row
from mmvision_export.models.minimax_m3_vl.images import EncodedImage

__all__ = ["Columns", "TablePart", "rows_of_tables"]

# Encoded images in memory at one time.
_ROWS_PER_READ = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Attributes:
        image: Encoded images: binary, or a struct with a binary field `bytes`, as Hugging Face's
            datasets have it.
        id: Strings or integers; None for `id` where there is one, else the file's name and the row's
            number.
    """

    image: str = "image"
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class TablePart:
    """Whole row groups of one file.

    Attributes:
        index: See `Part`.
        uri: Its file system is the one that the file is in; None for this machine's.
        path: Path of the file in that file system.
        name: What errors and ids call the file.
        row_groups: Their numbers.
        first_row: Number of the first row in the file.
        num_rows: See `Part`.
        columns: With an id column that is there, or None.
    """

    index: int
    uri: str | None
    path: str
    name: str
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int
    columns: Columns

    def rows(self) -> Iterator[Row]:
        """See `Part.rows`."""
        arrow = required_pyarrow()
        system, _ = file_system(self.uri)
        columns = [self.columns.image, *([self.columns.id] if self.columns.id else [])]
        number = self.first_row
        try:
            with system.open_input_file(self.path) as file:
                batches = arrow.parquet.ParquetFile(file).iter_batches(
                    batch_size=_ROWS_PER_READ, row_groups=list(self.row_groups), columns=columns
                )
                for batch in batches:
                    for index, value in enumerate(batch.column(self.columns.image)):
                        yield self._row(batch, index, number, value.as_py())
                        number += 1
        except (OSError, arrow.ArrowException) as error:
            raise InputError(
                f"{self.name}: cannot be read: {error}", reason="unreadable"
            ) from error

    def _row(self, batch: Any, index: int, number: int, value: Any) -> Row:
        place = f"{self.name}:{number}"
        name = place
        if self.columns.id is not None:
            given = batch.column(self.columns.id)[index].as_py()
            if given is None:
                return Row(place, None, f"{place}: {self.columns.id} is null")
            name = str(given)
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            return Row(name, None, f"{place}: {self.columns.image} is null")
        if len(content) > MAX_ENCODED_BYTES:
            error = f"has {len(content)} bytes, the limit is {MAX_ENCODED_BYTES}"
            return Row(name, None, f"{place}: {error}")
        return Row(name, EncodedImage(place, content))


def rows_of_tables(
    name: str,
    files: Sequence[tuple[str, str]],
    uri: str | None,
    columns: Columns,
    *,
    rows_per_part: int,
) -> Listing:
    """The rows of Parquet files.

    Args:
        name: The input as it was given.
        files: Path in the file system, and name, of each file.
        uri: Gives the file system; None for this machine's.
        columns: Which columns are read.
        rows_per_part: A part has no more, but for a row group that has.

    Raises:
        InputError: A file is no Parquet, or lacks a column, or it is of another type; or there are
            no rows.
    """
    arrow = required_pyarrow()
    system, _ = file_system(uri)
    digest = hashlib.sha256()
    parts: list[TablePart] = []
    for path, called in files:
        try:
            info = system.get_file_info(path)
            with system.open_input_file(path) as file:
                opened = arrow.parquet.ParquetFile(file)
                schema, metadata = opened.schema_arrow, opened.metadata
                counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, arrow.ArrowException) as error:
            raise InputError(
                f"{called}: not readable as Parquet: {error}", reason="unreadable"
            ) from error
        found = _checked_columns(called, schema, columns)
        digest.update(f"{called}\0{info.size} {info.mtime_ns} {found}\0".encode())
        first_row = 0
        for groups in _grouped(counts, rows_per_part):
            num_rows = sum(counts[group] for group in groups)
            parts.append(
                TablePart(len(parts), uri, path, called, groups, first_row, num_rows, found)
            )
            first_row += num_rows
    if not parts:
        raise InputError(f"no rows in {name}", reason="missing")
    return Listing(name, parts, digest.hexdigest())


def _grouped(counts: Sequence[int], rows_per_part: int) -> Iterator[tuple[int, ...]]:
    """Consecutive row groups that together have no more rows than a part; empty ones left out."""
    groups: list[int] = []
    rows = 0
    for group, count in enumerate(counts):
        if groups and rows + count > rows_per_part:
            yield tuple(groups)
            groups, rows = [], 0
        if count:
            groups.append(group)
            rows += count
    if groups:
        yield tuple(groups)


def _checked_columns(name: str, schema: Any, columns: Columns) -> Columns:
    arrow = required_pyarrow()
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    identity = columns.id or ("id" if "id" in schema.names else None)
    for column in (columns.image, identity):
        if column is not None and column not in schema.names:
            raise InputError(
                f"{name} has no column {column}; its columns are {there}",
                hint="choose with --image-column and --id-column",
            )
    kind = schema.field(columns.image).type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
        raise InputError(
            f"{name}: column {columns.image} must hold encoded images, as binary or a struct with "
            f"binary bytes, got {schema.field(columns.image).type}",
            hint="choose with --image-column",
        )
    if identity is not None:
        kind = schema.field(identity).type
        if not (
            arrow.types.is_string(kind)
            or arrow.types.is_large_string(kind)
            or arrow.types.is_integer(kind)
        ):
            raise InputError(f"{name}: column {identity} must hold strings or integers, got {kind}")
    return Columns(columns.image, identity)
