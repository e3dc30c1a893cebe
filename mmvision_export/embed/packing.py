"""Pictures to embeddings, packed into calls by a budget of patches.

The same rows in the same order are packed in the same way. No image's failure stops the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.core.errors import BackendError, InputError, NotFiniteError
from mmvision_export.embed.decoding import Decoded
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_pictures,
)
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["Embedded", "Failed", "embedded_rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """A row with its embeddings.

    Attributes:
        id: The row's.
        grid_thw: Its t, h, w, in patches.
        image_embeds: `[tokens, text_hidden_size]` in the model's float type.
    """

    id: str
    grid_thw: tuple[int, int, int]
    image_embeds: npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A row without.

    Attributes:
        id: The row's.
        error: Why.
    """

    id: str
    error: str


def embedded_rows(
    encoder: VisionEncoder,
    pictures: Iterable[Decoded],
    preprocessor: PreprocessorConfig,
    *,
    patches_per_call: int,
) -> Iterator[Embedded | Failed]:
    """Encode pictures, as many in one call as the budget has room for, and at least one.

    Args:
        encoder: The encoder.
        pictures: In order.
        preprocessor: What they were made by.
        patches_per_call: Most patches of a call, but for one image that has more.

    Yields:
        One result for each row, those of a call together.

    Raises:
        BackendError: The runtime failed, and fails on any image.
    """
    gathered: list[tuple[str, Image.Image]] = []
    patches = 0
    for decoded in pictures:
        if decoded.picture is None:
            yield Failed(decoded.id, decoded.error or "not decoded")
            continue
        more = _patches_of(decoded.picture, preprocessor)
        if gathered and patches + more > patches_per_call:
            yield from _encoded(encoder, gathered, preprocessor)
            gathered, patches = [], 0
        gathered.append((decoded.id, decoded.picture))
        patches += more
    if gathered:
        yield from _encoded(encoder, gathered, preprocessor)


def _patches_of(picture: Image.Image, preprocessor: PreprocessorConfig) -> int:
    side = preprocessor.patch_size
    return (picture.height // side) * (picture.width // side)


def _encoded(
    encoder: VisionEncoder,
    gathered: Sequence[tuple[str, Image.Image]],
    preprocessor: PreprocessorConfig,
) -> Iterator[Embedded | Failed]:
    batch = batch_from_pictures(
        [picture for _, picture in gathered], preprocessor, dtype=encoder.dtype
    )
    names = [name for name, _ in gathered]
    results: Sequence[npt.NDArray[np.floating] | None]
    try:
        results = batch.grid.split(encoder.encode(batch))
    except NotFiniteError as error:
        results = error.image_embeds
    except (InputError, BackendError) as error:
        if len(gathered) > 1:  # which image it is, shows when each is alone
            for one in gathered:
                yield from _encoded(encoder, [one], preprocessor)
            return
        if isinstance(error, BackendError):
            _refuse_broken(encoder, batch)
        yield Failed(names[0], error.message)
        return
    for name, row, embeds in zip(names, batch.grid.tuples(), results, strict=True):
        if embeds is None:
            yield Failed(name, "the embeddings are not finite")
        else:
            yield Embedded(name, row, embeds)


def _refuse_broken(encoder: VisionEncoder, batch: PackedBatch) -> None:
    """Raise if the runtime fails on a plain image too: then the image before was not at fault.

    Raises:
        BackendError: It does.
    """
    merge = encoder.config.spatial_merge_size
    grid = PackedGrid(np.array([[1, merge, merge]], np.int64), batch.grid.patches_per_token)
    grey = np.zeros((grid.num_patches, encoder.config.patch_dim), encoder.dtype)
    try:
        encoder.encode(PackedBatch(grey, grid))
    except InputError:  # an engine that takes no image so small tells nothing
        return
