"""A folder of images to a folder of embeddings, a file for each.

An interrupted run goes on where it stopped. While one image is encoded, the next ones are decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmvision_export.core.ahead import computed_ahead, worker_threads
from mmvision_export.core.errors import InputError, MmvisionError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.embeds_file import embeds_file
from mmvision_export.runtime.folder_files import FolderFile, FolderFiles, output_path
from mmvision_export.runtime.folder_record import FolderRecords
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["STATUSES", "encode_folder", "run_identity"]

STATUSES = ("encoded", "already_there", "failed", "passed_over")
"""What becomes of a file; only a link to a folder is `passed_over`."""


def run_identity(encoder: VisionEncoder, *, resize_to_fit: bool, draft: bool) -> dict[str, Any]:
    """What embeddings depend on but for the images.

    Those of another model may not stand beside them.
    """
    return {
        "weights_sha256": encoder.facts.weights_sha256,
        "precision": encoder.facts.precision,
        "preprocessor": encoder.preprocessor.to_dict(),
        "resize_to_fit": resize_to_fit,
        "draft": draft,
    }


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A file's patches, and its size and time before it was read."""

    status: os.stat_result
    batch: PackedBatch


def encode_folder(
    encoder: VisionEncoder,
    decoder: ImageDecoder,
    listed: FolderFiles,
    output: Path,
    form: str,
    *,
    force: bool,
) -> Iterator[dict[str, Any]]:
    """Encode every file, one after the other, each into a file of its own.

    A file is kept if it is whole and recorded to be made of the image as it is now. Every file of a
    folder is tried: what is no image is a failure, and said to be one. No image's failure stops the
    others.

    Args:
        encoder: The encoder.
        decoder: Makes its batches.
        listed: The files.
        output: Folder of the embeddings, see `output_path`.
        form: One of `FORMATS`.
        force: Encode anew what is there already.

    Yields:
        For each file its `input`, its `status` (one of `STATUSES`), and the numbers or the error;
        the same for folders that cannot be listed.

    Raises:
        OutputError: The records of the folder cannot be read or written.
    """
    for folder, reason in listed.unreadable:
        error = f"{folder}: cannot be listed: {reason}"
        yield {"input": str(folder), "status": "failed", "error": error}
    for link in listed.linked:
        error = f"{link}: a link to a folder is not followed"
        yield {"input": str(link), "status": "passed_over", "error": error}
    with FolderRecords(output) as records:

        def prepare(file: FolderFile) -> _Prepared | None:
            status = _status_of(file.source)
            target = output_path(output, file.name, form)
            if not force and records.has(file.source, status, target):
                return None
            batch = decoder.batch([file.source], dtype=encoder.dtype)
            return _Prepared(status, batch)

        # Closed in any case, so that an interrupt does not wait for images that were not begun.
        with contextlib.closing(
            computed_ahead(prepare, listed.files, threads=worker_threads())
        ) as ahead:
            for file, future in ahead:
                target = output_path(output, file.name, form)
                report: dict[str, Any] = {"input": str(file.source), "output": str(target)}
                try:
                    prepared = future.result()
                    if prepared is None:
                        yield {**report, "status": "already_there"}
                        continue
                    grid = prepared.batch.grid
                    image_embeds = encoder.encode(prepared.batch)
                    with embeds_file(target) as new:
                        new.add(str(file.source), grid.tuples()[0], image_embeds)
                except MmvisionError as error:
                    failed = {"status": "failed", "error": _naming(file.source, error)}
                    yield {"input": str(file.source), **failed}
                    continue
                records.add(file.source, prepared.status, target)
                yield {**report, "status": "encoded", "tokens": grid.num_tokens}


def _status_of(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", reason="missing") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", reason="unreadable") from error


def _naming(path: Path, error: MmvisionError) -> str:
    """The error's words, with the file that it is about."""
    message = error.message
    return message if str(path) in message else f"{path}: {message}"
