"""The tables: a folder that holds `embeddings/` and `failures/`, a file in each for each part.

`mmvision-embed.json` says of what run they are. A part is written aside and renamed into
`embeddings/` once it is whole and on the disk, its failures first: a file in `embeddings/` says that
the part is done. So a run that was killed, at any moment, has each row of a finished part once and no
row of another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import OutputError
from mmvision_export.core.files import read_json
from mmvision_export.embed.arrow import required_pyarrow
from mmvision_export.embed.listing import Listing, Part, utf8
from mmvision_export.embed.packing import Embedded, Failed
from mmvision_export.embed.stored import StoredType, cell_from_array

try:
    import fcntl
except ImportError:  # Windows, where nobody else is kept out
    fcntl = None  # type: ignore[assignment]

__all__ = ["Done", "TableFacts", "check_output", "done_parts", "opened_output", "write_part"]

_IDENTITY = "mmvision-embed.json"
_EMBEDDINGS = "embeddings"
_FAILURES = "failures"
# A row group is as large as is read at one time with ease.
_ROW_GROUP_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class TableFacts:
    """What every row of the table shares.

    Attributes:
        dtype: Type of the embeddings.
        width: text_hidden_size.
        weights_sha256: Of the weights.
        model_sha256: Of the graph or engine that ran.
    """

    dtype: StoredType
    width: int
    weights_sha256: str
    model_sha256: str


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a part's rows.

    Attributes:
        part: Its number.
        embedded: Rows in `embeddings/`.
        failed: Rows in `failures/`.
    """

    part: int
    embedded: int
    failed: int

    @property
    def num_rows(self) -> int:
        """All of them."""
        return self.embedded + self.failed


def part_name(index: int) -> str:
    """File name of a part."""
    return f"part-{index:06}.parquet"


def check_output(output: Path, listing: Listing, identity: dict[str, Any], *, force: bool) -> None:
    """Refuse a folder that this run may not write to.

    Args:
        output: The folder.
        listing: The input.
        identity: What the tables depend on but for the input, a JSON object.
        force: Whether what another run has left there is replaced.

    Raises:
        OutputError: It holds another run's tables, or something else, or lies in the input.
        ManifestError: What it says of itself is damaged.
    """
    source = Path(listing.name)
    if "://" not in listing.name and output.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{output} lies in the input", hint="choose another --output")
    mark = output / _IDENTITY
    if not output.exists():
        return
    if not output.is_dir() or (not mark.is_file() and _holds_something(output)):
        raise OutputError(
            f"{output} is not a folder that mmvision embed has written",
            hint="choose another --output",
        )
    if force or not mark.is_file():
        return
    there, here = read_json(mark), _with_input(identity, listing)
    differing = sorted(name for name in {*here, *there} if there.get(name) != here.get(name))
    if differing:
        raise OutputError(
            f"{output} holds embeddings of another run: {', '.join(differing)} differs",
            hint="choose another --output, or embed everything again with --force",
        )


@contextlib.contextmanager
def opened_output(
    output: Path, listing: Listing, identity: dict[str, Any], *, force: bool
) -> Iterator[None]:
    """The folder, held by this run for the block, and marked as its own.

    Raises:
        OutputError: See `check_output`; or another run holds it, or it cannot be written.
    """
    check_output(output, listing, identity, force=force)
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written to: {error.strerror}") from error
    try:
        _refuse_second_run(handle, output)
        if force:
            # Before the new mark: no part may ever be taken for another run's.
            for folder in (_EMBEDDINGS, _FAILURES):
                shutil.rmtree(output / folder, ignore_errors=True)
        with new_files(output, name=_IDENTITY) as new:
            content = json.dumps(_with_input(identity, listing), indent=2)
            (new / _IDENTITY).write_text(f"{content}\n", encoding="utf-8")
        yield
    finally:
        os.close(handle)


def done_parts(output: Path, listing: Listing) -> dict[int, Done]:
    """The parts that are there and have all their rows, by number."""
    arrow = required_pyarrow()
    done: dict[int, Done] = {}
    for part in listing.parts:
        embeddings, failures = (
            output / folder / part_name(part.index) for folder in (_EMBEDDINGS, _FAILURES)
        )
        if not embeddings.exists():
            continue
        try:
            embedded = arrow.parquet.read_metadata(embeddings).num_rows
            failed = arrow.parquet.read_metadata(failures).num_rows if failures.exists() else 0
        except (OSError, arrow.ArrowException):  # damaged: it is made again
            continue
        found = Done(part.index, embedded, failed)
        if found.num_rows == part.num_rows:
            done[part.index] = found
    return done


def write_part(
    output: Path, part: Part, results: Iterable[Embedded | Failed], facts: TableFacts
) -> Done:
    """Write one part, as its results come.

    Args:
        output: The folder.
        part: Which one.
        results: One for each of its rows.
        facts: What every row shares.

    Raises:
        OutputError: It cannot be written.
    """
    arrow = required_pyarrow()
    name = part_name(part.index)
    failures: list[Failed] = []
    embedded = 0
    with new_files(output / _EMBEDDINGS, name=name) as new:
        with _EmbeddingsFile(new / name, facts) as file:
            for result in results:
                if isinstance(result, Failed):
                    failures.append(result)
                elif (cell := cell_from_array(result.image_embeds, facts.dtype)) is None:
                    failures.append(Failed(result.id, f"the embeddings overflow in {facts.dtype}"))
                else:
                    file.add(result.id, result.grid_thw, cell)
                    embedded += 1
        done = Done(part.index, embedded, len(failures))
        assert done.num_rows == part.num_rows
        target = output / _FAILURES / name
        if failures:
            with new_files(target.parent, name=name) as beside:
                columns = {
                    "id": [failure.id for failure in failures],
                    "error": [utf8(failure.error) for failure in failures],
                }
                schema = arrow.schema([("id", arrow.string()), ("error", arrow.string())])
                arrow.parquet.write_table(
                    arrow.table(columns, schema=schema), beside / name, compression="zstd"
                )
        else:
            target.unlink(missing_ok=True)  # of a run that was killed before the rename below
    return done


class _EmbeddingsFile:
    """One Parquet file of embeddings, written in row groups."""

    def __init__(self, path: Path, facts: TableFacts) -> None:
        arrow = required_pyarrow()
        self._arrow, self._facts = arrow, facts
        self._schema = arrow.schema(
            [
                arrow.field("id", arrow.string(), nullable=False),
                arrow.field("grid_thw", arrow.list_(arrow.int64(), 3), nullable=False),
                arrow.field("embeddings", arrow.large_binary(), nullable=False),
                arrow.field("weights_sha256", arrow.string(), nullable=False),
                arrow.field("model_sha256", arrow.string(), nullable=False),
            ],
            metadata={"dtype": facts.dtype, "width": str(facts.width)},
        )
        self._writer = arrow.parquet.ParquetWriter(
            path,
            self._schema,
            # Noise does not compress, and its least and largest value tell nothing.
            compression={
                name: "none" if name == "embeddings" else "zstd" for name in self._schema.names
            },
            use_dictionary=["weights_sha256", "model_sha256"],
            write_statistics=["id"],
        )
        self._rows: list[tuple[str, tuple[int, int, int], bytes]] = []
        self._bytes = 0

    def add(self, name: str, grid_thw: tuple[int, int, int], cell: bytes) -> None:
        self._rows.append((name, grid_thw, cell))
        self._bytes += len(cell)
        if self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        count = len(self._rows)
        columns = {
            "id": [name for name, _, _ in self._rows],
            "grid_thw": [list(row) for _, row, _ in self._rows],
            "embeddings": [cell for _, _, cell in self._rows],
            "weights_sha256": [self._facts.weights_sha256] * count,
            "model_sha256": [self._facts.model_sha256] * count,
        }
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))
        self._rows, self._bytes = [], 0

    def __enter__(self) -> _EmbeddingsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()


def _with_input(identity: dict[str, Any], listing: Listing) -> dict[str, Any]:
    """The whole identity, as JSON gives it back: tuples are lists there."""
    content = {**identity, "input_rows": listing.num_rows, "input_sha256": listing.sha256}
    there: dict[str, Any] = json.loads(json.dumps(content))
    return there


def _refuse_second_run(handle: int, output: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run is writing to {output}", hint="wait for it, or choose another --output"
        ) from None
    except OSError:  # a file system without locks
        return


def _holds_something(output: Path) -> bool:
    """Whether there is more than what a killed run had begun to write."""
    return any(
        not (entry.name.startswith(".new.") and entry.name.endswith(".partial"))
        for entry in output.iterdir()
    )
