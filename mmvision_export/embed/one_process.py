"""A run in this process: decoding on threads, one encoder, part after part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mmvision_export.core.progress import Progress
from mmvision_export.embed.decoding import decoded_rows
from mmvision_export.embed.listing import Part
from mmvision_export.embed.output import Done, write_part
from mmvision_export.embed.packing import Embedded, Failed, embedded_rows
from mmvision_export.embed.settings import EmbedSettings, table_facts
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["embed_parts"]


def embed_parts(
    encoder: VisionEncoder,
    parts: Iterable[Part],
    output: Path,
    settings: EmbedSettings,
    *,
    progress: Progress,
) -> Iterator[Done]:
    """Embed parts one after the other.

    Args:
        encoder: The encoder.
        parts: Those that are not done yet.
        output: Folder of the tables, which this run holds.
        settings: How.
        progress: Advanced by each row.

    Yields:
        Each part when it is in place.

    Raises:
        InputError: What holds the rows cannot be read any more.
        OutputError: A part cannot be written.
        BackendError: The runtime failed.
    """
    preprocessor = encoder.preprocessor_for(resize_to_fit=settings.resize_to_fit)
    decoder = settings.decoder(preprocessor)
    facts = table_facts(encoder, settings)
    for part in parts:
        results = embedded_rows(
            encoder,
            decoded_rows(part.rows(), decoder),
            preprocessor,
            patches_per_call=settings.budget(encoder),
        )
        yield write_part(output, part, _counted(results, progress), facts)


def _counted(
    results: Iterable[Embedded | Failed], progress: Progress
) -> Iterator[Embedded | Failed]:
    for result in results:
        yield result
        progress.advance()
