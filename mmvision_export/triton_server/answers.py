"""Requests of different sizes, packed into calls of the encoder; an answer or an error for each.

Requests are packed in the order in which they came, until a call has the patches that are worth one:
so a request waits for the calls before it, and not for all that came with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.ahead import mapped, worker_threads
from mmvision_export.core.errors import InputError, MmvisionError, NotFiniteError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.images import EncodedImage
from mmvision_export.models.minimax_m3_vl.packed_batch import (
    PackedBatch,
    PackedGrid,
    checked_batch,
)
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["Answer", "Request", "answers_by_call", "request_from_arrays", "warm_up"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What one request asks for: images, or patches with their grid.

    Attributes:
        images: Encoded images; None with patches.
        pixel_values: `[num_patches, patch_dim]` float32; None with images.
        grid_thw: `[num_images, 3]` int64; None with images.
    """

    images: tuple[bytes, ...] | None = None
    pixel_values: npt.NDArray[Any] | None = None
    grid_thw: npt.NDArray[Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Embeddings of one request.

    Attributes:
        image_embeds: `[num_image_tokens, text_hidden_size]`, images in order.
        grid_thw: `[num_images, 3]` int64.
        tokens_per_image: `[num_images]` int64.
    """

    image_embeds: npt.NDArray[np.floating]
    grid_thw: npt.NDArray[np.int64]
    tokens_per_image: npt.NDArray[np.int64]


def request_from_arrays(
    image: npt.NDArray[Any] | None,
    pixel_values: npt.NDArray[Any] | None,
    grid_thw: npt.NDArray[Any] | None,
) -> Request:
    """A request of the input tensors, each with a leading dimension of 1; None for one that is missing.

    Raises:
        InputError: Images and patches are given, or neither, or one of two that go together; or a
            leading dimension is not 1.
    """
    given = {"image": image, "pixel_values": pixel_values, "grid_thw": grid_thw}
    there = {name: array for name, array in given.items() if array is not None}
    if list(there) not in (["image"], ["pixel_values", "grid_thw"]):
        raise InputError(
            f"give image, or pixel_values with grid_thw, got {', '.join(there) or 'none of them'}"
        )
    for name, array in there.items():
        if not array.shape or array.shape[0] != 1:
            raise InputError(
                f"{name} must have a leading dimension of 1, got shape {list(array.shape)}"
            )
    if image is None:
        assert pixel_values is not None
        assert grid_thw is not None
        return Request(pixel_values=pixel_values[0], grid_thw=grid_thw[0])
    return Request(images=tuple(_bytes_of(value) for value in image[0]))


def answers_by_call(
    encoder: VisionEncoder, decoder: ImageDecoder, requests: Sequence[Request]
) -> Iterator[list[tuple[int, Answer | MmvisionError]]]:
    """Answer requests, several with one call of the encoder.

    Args:
        encoder: The encoder.
        decoder: Makes patches of images.
        requests: In the order in which they came.

    Yields:
        For each call the numbers of its requests, each with its answer, or the error that is its
        own: no request's error reaches another.
    """

    def prepared(request: Request) -> PackedBatch | MmvisionError:
        try:
            return _batch_of(request, encoder, decoder)
        except MmvisionError as error:
            return error

    batches = mapped(prepared, requests, threads=worker_threads())
    refused = [(i, batch) for i, batch in enumerate(batches) if isinstance(batch, MmvisionError)]
    if refused:
        yield list(refused)
    gathered: list[tuple[int, PackedBatch]] = []
    patches = 0
    for index, batch in enumerate(batches):
        if isinstance(batch, MmvisionError):
            continue
        more = batch.grid.num_patches
        if gathered and patches + more > encoder.patches_per_call:
            yield _answered(encoder, gathered)
            gathered, patches = [], 0
        gathered.append((index, batch))
        patches += more
    if gathered:
        yield _answered(encoder, gathered)


def warm_up(encoder: VisionEncoder, calls: Sequence[Sequence[Sequence[int]]]) -> None:
    """Encode grey images, so that nothing is compiled or captured in a user's call.

    Args:
        encoder: The encoder.
        calls: Grid rows of each call.
    """
    for call in calls:
        grid = PackedGrid(np.array(call, np.int64), encoder.config.patches_per_token)
        patches = np.zeros((grid.num_patches, encoder.config.patch_dim), encoder.dtype)
        encoder.encode(PackedBatch(patches, grid))


def _bytes_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _batch_of(request: Request, encoder: VisionEncoder, decoder: ImageDecoder) -> PackedBatch:
    if request.images is None:
        return checked_batch(request.pixel_values, request.grid_thw, encoder.config, encoder.dtype)
    images = [EncodedImage(f"image {i}", content) for i, content in enumerate(request.images)]
    # One thread for a request: requests have one each.
    return decoder.batch(images, dtype=encoder.dtype, threads=1)


def _answered(
    encoder: VisionEncoder, gathered: Sequence[tuple[int, PackedBatch]]
) -> list[tuple[int, Answer | MmvisionError]]:
    batches = [batch for _, batch in gathered]
    grids = [batch.grid for batch in batches]
    rows = np.concatenate([grid.rows for grid in grids])
    packed = PackedBatch(
        np.concatenate([batch.pixel_values for batch in batches]),
        PackedGrid(rows, grids[0].patches_per_token),
    )
    per_image: Sequence[npt.NDArray[np.floating] | None]
    try:
        per_image = packed.grid.split(encoder.encode(packed))
    except NotFiniteError as error:
        per_image = error.image_embeds
    except MmvisionError as error:
        if len(gathered) == 1:
            return [(gathered[0][0], error)]
        # Which request it is, shows when each is alone.
        return [answer for one in gathered for answer in _answered(encoder, [one])]
    results: list[tuple[int, Answer | MmvisionError]] = []
    first = 0
    for (index, _), grid in zip(gathered, grids, strict=True):
        results.append((index, _answer(grid, per_image[first : first + len(grid)])))
        first += len(grid)
    return results


def _answer(
    grid: PackedGrid, embeds: Sequence[npt.NDArray[np.floating] | None]
) -> Answer | MmvisionError:
    finite = [each for each in embeds if each is not None]
    if len(finite) < len(embeds):
        images = [index for index, each in enumerate(embeds) if each is None]
        numbers = ", ".join(map(str, images))
        return InputError(f"the embeddings of image {numbers} are not finite")
    return Answer(
        finite[0] if len(finite) == 1 else np.concatenate(finite),
        grid.rows,
        np.array(grid.tokens_per_image, np.int64),
    )
