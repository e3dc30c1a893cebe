"""`mmvision embed` from end to end: list, open, compare with what is there, embed what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.core.progress import Progress
from mmvision_export.embed.arrow import required_pyarrow
from mmvision_export.embed.inputs import listed_input
from mmvision_export.embed.listing import Listing, Part
from mmvision_export.embed.on_ray import (
    RayWorkers,
    embed_parts_on_ray,
    opened_on_ray,
    ray_session,
)
from mmvision_export.embed.one_process import embed_parts
from mmvision_export.embed.output import Done, check_output, done_parts, opened_output
from mmvision_export.embed.settings import EmbedSettings, identity_of_run
from mmvision_export.embed.tables import Columns
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["EmbedResult", "embed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run has done, or, without doing it, would do.

    Attributes:
        input: As it was given.
        output: The folder of the tables.
        rows: Of the input.
        parts: Of the input.
        already_embedded: Rows that an earlier run has embedded.
        already_failed: Rows that it could not.
        embedded: Rows that this run has embedded.
        failed: Rows that this run could not embed; they are in `failures/`.
        identity: What the tables depend on but for the input.
    """

    input: str
    output: str
    rows: int
    parts: int
    already_embedded: int
    already_failed: int
    embedded: int
    failed: int
    identity: dict[str, Any]


def embed(
    name: str,
    output: Path,
    model: Path,
    *,
    options: BackendOptions | None = None,
    settings: EmbedSettings | None = None,
    columns: Columns | None = None,
    workers: RayWorkers | None = None,
    force: bool = False,
    retry_failed: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> EmbedResult:
    """Embed all rows of an input that are not in the output yet.

    Args:
        name: A folder, a `.parquet` file, or a URI; see `listed_input`.
        output: Folder of the tables.
        model: A model directory or an engine.
        options: How it is opened.
        settings: How images are embedded.
        columns: Which columns of Parquet are read.
        workers: Who embeds on Ray; None for this process.
        force: Replace what another run has left in the output.
        retry_failed: Embed anew the parts of an earlier run that have failures.
        dry_run: Do all but the embedding, and write nothing.
        progress: Told about each row.

    Raises:
        InputError: The input is missing or cannot be read.
        OutputError: The output may not be written to, or cannot.
        BackendError: pyarrow is missing, the model does not open, or the runtime failed.
        ManifestError: The model directory is damaged.
    """
    required_pyarrow()
    options = options or BackendOptions()
    settings = settings or EmbedSettings()
    progress = progress or Progress()
    listing = listed_input(name, rows_per_part=settings.rows_per_part, columns=columns or Columns())
    for note in listing.notes:
        progress.note(note)
    with contextlib.ExitStack() as stack:
        runner: _OneProcess | _OnRay
        if workers is None:
            encoder = stack.enter_context(VisionEncoder.open(model, options, progress=progress))
            runner = _OneProcess(encoder, settings)
        else:
            ray = stack.enter_context(ray_session(workers))
            runner = _OnRay(ray, model, workers.options_of(options), settings, workers)
        identity = runner.identity
        if dry_run:
            check_output(output, listing, identity, force=force)
            done = {} if force else _kept_parts(output, listing, retry_failed=retry_failed)
            return _result(listing, output, identity, done, ())
        stack.enter_context(opened_output(output, listing, identity, force=force))
        done = _kept_parts(output, listing, retry_failed=retry_failed)
        missing = [part for part in listing.parts if part.index not in done]
        progress.step("embedding", total=listing.num_rows)
        progress.advance(sum(part.num_rows for part in done.values()))
        results = list(runner.embed(missing, output, progress))
    return _result(listing, output, identity, done, results)


class _OneProcess:
    """Embeds in this process."""

    def __init__(self, encoder: VisionEncoder, settings: EmbedSettings) -> None:
        self._encoder, self._settings = encoder, settings
        self.identity = identity_of_run(encoder, settings)

    def embed(self, parts: Sequence[Part], output: Path, progress: Progress) -> Iterator[Done]:
        return embed_parts(self._encoder, parts, output, self._settings, progress=progress)


class _OnRay:
    """Embeds in Ray's actors."""

    def __init__(
        self,
        ray: Any,
        model: Path,
        options: BackendOptions,
        settings: EmbedSettings,
        workers: RayWorkers,
    ) -> None:
        self._arguments = (model, options, settings, workers)
        self._ray = ray
        self._opened = opened_on_ray(ray, *self._arguments)
        self.identity = self._opened.identity

    def embed(self, parts: Sequence[Part], output: Path, progress: Progress) -> Iterator[Done]:
        return embed_parts_on_ray(
            self._ray, parts, output, *self._arguments, self._opened.preprocessor, progress=progress
        )


def _kept_parts(output: Path, listing: Listing, *, retry_failed: bool) -> dict[int, Done]:
    done = done_parts(output, listing)
    return {index: part for index, part in done.items() if not (retry_failed and part.failed)}


def _result(
    listing: Listing,
    output: Path,
    identity: dict[str, Any],
    done: dict[int, Done],
    results: Sequence[Done],
) -> EmbedResult:
    return EmbedResult(
        input=listing.name,
        output=str(output),
        rows=listing.num_rows,
        parts=len(listing.parts),
        already_embedded=sum(part.embedded for part in done.values()),
        already_failed=sum(part.failed for part in done.values()),
        embedded=sum(part.embedded for part in results),
        failed=sum(part.failed for part in results),
        identity=identity,
    )
