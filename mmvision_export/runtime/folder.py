"""A folder of images to a folder of embeddings, a file for each.

An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import MmvisionError, OutputError
from mmvision_export.core.files import read_json
from mmvision_export.models.minimax_m3_vl.images import image_from_file
from mmvision_export.models.minimax_m3_vl.preprocess import batch_from_images
from mmvision_export.runtime.embeds_file import embeds_file
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["encode_folder", "refuse_foreign_output", "run_identity"]

_IDENTITY = "mmvision-run.json"


def run_identity(encoder: VisionEncoder, *, resize_to_fit: bool) -> dict[str, Any]:
    """What embeddings depend on but for the images.

    Those of another model may not stand beside them.
    """
    return {
        "weights_sha256": encoder.facts.weights_sha256,
        "precision": encoder.facts.precision,
        "preprocessor": encoder.preprocessor.to_dict(),
        "resize_to_fit": resize_to_fit,
    }


def refuse_foreign_output(
    output: Path, inputs: Sequence[Path], identity: dict[str, Any], *, force: bool
) -> None:
    """Refuse to mix embeddings of two models in one folder, or with the images.

    Write down whose these are.

    Args:
        output: The folder of embeddings.
        inputs: Folders and files of images.
        identity: From `run_identity`.
        force: Whether to encode everything anew.

    Raises:
        OutputError: The folder holds another model's embeddings, or something else, or lies among
            the images.
    """
    if any(output.resolve().is_relative_to(path.resolve()) for path in inputs):
        raise OutputError(f"{output} lies in a folder of images", hint="choose another --output")
    mark = output / _IDENTITY
    # Through JSON, as it was written: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    if not force and output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not mark.is_file()):
            raise OutputError(
                f"{output} is not a folder of embeddings", hint="choose another --output"
            )
        if mark.is_file() and (there := read_json(mark)) != identity:
            differing = ", ".join(name for name in identity if there.get(name) != identity[name])
            raise OutputError(
                f"{output} holds embeddings of another run: {differing} differs",
                hint="choose another --output, or encode all of it anew with --force",
            )
    with new_files(output, name=_IDENTITY) as new:
        (new / _IDENTITY).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def encode_folder(
    encoder: VisionEncoder,
    inputs: Sequence[Path],
    output: Path,
    form: str,
    *,
    resize_to_fit: bool,
    force: bool,
) -> Iterator[dict[str, Any]]:
    """Encode every file, one after the other, each into a file of its own.

    A file that is there already, and not older than its image, is kept. Every file of a folder is
    tried, hidden ones
    excepted: what is no image is a failure, and said to be one.

    Args:
        encoder: The encoder.
        inputs: Files, and folders with all that is below them.
        output: Folder of the embeddings; a file is named after its image's path, with the format
            appended.
        form: One of `FORMATS`.
        resize_to_fit: See `VisionEncoder.encode_images`.
        force: Encode anew what is there already.

    Yields:
        For each file its `input`, its `status` (`encoded`, `already there` or `failed`), and the
        numbers or the error.
    """
    preprocessor = encoder.preprocessor_for(resize_to_fit=resize_to_fit)
    for source, name in _files(inputs):
        target = output / f"{name}.{form}"
        report: dict[str, Any] = {"input": str(source), "output": str(target)}
        if not force and target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
            yield {**report, "status": "already there"}
            continue
        try:
            batch = batch_from_images([image_from_file(source)], preprocessor, names=[str(source)])
            image_embeds = encoder.encode(batch)
            (row,) = batch.grid.tuples()
            with embeds_file(target) as file:
                file.add(str(source), row, image_embeds)
        except MmvisionError as error:
            yield {"input": str(source), "status": "failed", "error": str(error)}
            continue
        yield {**report, "status": "encoded", "tokens": batch.grid.num_tokens}


def _files(inputs: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Every file, and what its output is named after."""
    for path in inputs:
        if not path.is_dir():
            yield path, Path(path.name)
            continue
        for folder, below, names in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    file = Path(folder, name)
                    yield file, file.relative_to(path)
