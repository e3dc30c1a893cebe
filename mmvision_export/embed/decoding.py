"""Rows to pictures of the size that the encoder sees, on several threads, in order."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

from PIL import Image

from mmvision_export.core.ahead import computed_ahead, worker_threads
from mmvision_export.core.errors import InputError
from mmvision_export.embed.listing import Row
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder

__all__ = ["Decoded", "decoded_rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A row's picture, or why it has none.

    Attributes:
        id: The row's.
        picture: 8-bit RGB of the size that its grid says.
        error: Why there is none.
    """

    id: str
    picture: Image.Image | None
    error: str | None = None


def decoded_rows(
    rows: Iterable[Row], decoder: ImageDecoder, *, threads: int | None = None
) -> Iterator[Decoded]:
    """The picture of each row; an image that cannot be used is an error of its row.

    Args:
        rows: Read as they are needed, `threads` ahead.
        decoder: Makes the pictures.
        threads: Of decoding; `worker_threads()` if None.
    """

    def decode(row: Row) -> Decoded:
        if row.source is None:
            return Decoded(row.id, None, row.error)
        try:
            return Decoded(row.id, decoder.picture(row.source))
        except InputError as error:
            return Decoded(row.id, None, error.message)

    # Closed in any case, so that an interrupt does not wait for images that were not begun.
    with contextlib.closing(
        computed_ahead(decode, rows, threads=threads or worker_threads())
    ) as ahead:
        for _, future in ahead:
            yield future.result()
