"""One call below every server: images in, a list of bfloat16 `[tokens, text_hidden_size]` out.

```python
with VisionEncoder.open("engines/MiniMax-M3") as encoder:
    embedder = ImageEmbedder(encoder, cache=EmbedsCache(folder="embeds"))
    photo, scan = embedder.encode_images([Path("photo.jpg"), Image.open("scan.png")])
    photo.tensor()  # torch.bfloat16 [tokens, 6144]
```

A hit equals, to the bit, the result of the miss that made the entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image

from mmvision_export.core.ahead import mapped, worker_threads
from mmvision_export.core.errors import InputError, NotFiniteError
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.integrations.cache_keys import CacheKeys
from mmvision_export.integrations.embeds_cache import EmbedsCache
from mmvision_export.integrations.image_embeds import ImageEmbeds
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS, EncodedImage, opened_image
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, checked_batch
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image, upright
from mmvision_export.models.minimax_m3_vl.preprocess import (
    batch_from_pictures,
    independent,
    picture_from_image,
)
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["GivenImage", "ImageEmbedder", "PreparedImage"]

GivenImage = Union[Image.Image, bytes, Path]
"""A Pillow image, the bytes of an image file, or its path."""


_MOST_BYTES_PER_PIXEL = 8  # RGBA of 16 bits, without compression
_METADATA_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image that is ready to be encoded.

    Attributes:
        key: Of the cache; None without one.
        batch: Its patches, with the one row of its grid.
    """

    key: str | None
    batch: PackedBatch

    @property
    def num_patches(self) -> int:
        """The cost of encoding the image, to first order."""
        return self.batch.grid.num_patches


@dataclasses.dataclass(frozen=True, eq=False)
class _Keyed:
    """An image by its key, and how to get its picture if the key is not in the cache."""

    key: str | None
    picture: Callable[[], Image.Image]


class ImageEmbedder:
    """An encoder with an optional cache. Safe for use by several threads."""

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        cache: EmbedsCache | None = None,
        resize_to_fit: bool = False,
        max_pixels: int = MAX_FILE_PIXELS,
    ) -> None:
        """Hold them.

        Args:
            encoder: It stays open for as long as this is used.
            cache: None for none.
            resize_to_fit: Make an image too large for the engine as small as it has to be, rather
                than refuse it.
            max_pixels: Most pixels of an image file.

        Raises:
            InputError: The engine takes no image as large as the preprocessing's smallest.
        """
        self.encoder = encoder
        self.cache = cache
        self._preprocessor = encoder.preprocessor_for(resize_to_fit=resize_to_fit)
        self._max_pixels = max_pixels
        self._keys = CacheKeys.for_encoder(encoder, self._preprocessor)

    def encode_images(self, images: Sequence[GivenImage]) -> list[ImageEmbeds]:
        """Encode images of any sizes. Images of one key are encoded once, cached ones not at all.

        Returns:
            One for each image, in order.

        Raises:
            InputError: There are no images, an image cannot be read or processed, or an image is too
                large for the engine or for the available memory. The error names the image.
            NotFiniteError: Embeddings of some images are not finite; it has those of the others.
            BackendError: The runtime failed.
        """
        if not images:
            raise InputError("no images were given", reason="missing")
        opened = [image for image in images if isinstance(image, Image.Image)]
        threads = worker_threads() if independent(opened) else 1
        keyed = mapped(self._keyed, list(enumerate(images)), threads=threads)
        found, missing = self._lookup([each.key for each in keyed])
        if missing:
            pictures = mapped(
                lambda index: _named(index, keyed[index].picture), missing, threads=threads
            )
            batch = batch_from_pictures(pictures, self._preprocessor, dtype=self.encoder.dtype)
            self._encode(batch, missing, [each.key for each in keyed], found)
        return _all_of(found)

    def prepare(self, image: GivenImage) -> PreparedImage:
        """The part of `encode_images` that needs no engine, for servers that run it by itself.

        Raises:
            InputError: The image cannot be read or processed, or is larger than the engine takes.
        """
        keyed = self._keyed((0, image))
        picture = _named(0, keyed.picture)
        batch = batch_from_pictures([picture], self._preprocessor, dtype=self.encoder.dtype)
        most = self.encoder.max_patches
        if most is not None and batch.grid.num_patches > most:
            raise InputError(
                f"image has {batch.grid.num_patches} patches, the engine takes {most}",
                hint="open it with resize_to_fit, or build an engine with a larger bucket",
            )
        return PreparedImage(keyed.key, batch)

    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageEmbeds]:
        """Encode images from `prepare`, in one packed batch; see `encode_images`."""
        if not images:
            raise InputError("no images were given", reason="missing")
        keys = [each.key for each in images]
        found, missing = self._lookup(keys)
        if missing:
            batch = PackedBatch.of_images(
                [(images[i].batch.pixel_values, images[i].batch.grid.tuples()[0]) for i in missing],
                self.encoder.config.patches_per_token,
            )
            self._encode(batch, missing, keys, found)
        return _all_of(found)

    def encode_patches(self, pixel_values: Any, grid_thw: Any) -> list[ImageEmbeds]:
        """Encode the output of another processor.

        Args:
            pixel_values: `[num_patches, patch_dim]` float32, or the encoder's type.
            grid_thw: `[num_images, 3]` integers, rows (t, h, w) in patches.

        Returns:
            One for each row of `grid_thw`, in order.

        Raises:
            InputError: See `VisionEncoder.__call__`.
        """
        encoder = self.encoder
        batch = checked_batch(pixel_values, grid_thw, encoder.config, encoder.dtype)
        prepared = []
        for index, row in enumerate(batch.grid.tuples()):
            image = batch.images(slice(index, index + 1))
            key = None
            if self.cache is not None:
                key = self._keys.of_patches(image.pixel_values, row)
            prepared.append(PreparedImage(key, image))
        return self.encode_prepared(prepared)

    def _keyed(self, indexed: tuple[int, GivenImage]) -> _Keyed:
        index, image = indexed
        if isinstance(image, Image.Image):
            if self.cache is None:
                return _Keyed(None, lambda: picture_from_image(image, self._preprocessor))
            rgb: Image.Image = _named(index, lambda: rgb_from_image(upright(image)))
            return _Keyed(
                self._keys.of_picture(rgb), lambda: picture_from_image(rgb, self._preprocessor)
            )
        # Read once: what is hashed is what is decoded, whatever happens to the file meanwhile.
        content = image if isinstance(image, bytes) else _named(index, lambda: self._read(image))
        name = "bytes" if isinstance(image, bytes) else str(image)
        key = None if self.cache is None else self._keys.of_file(content)
        return _Keyed(key, lambda: self._picture(EncodedImage(name, content)))

    def _read(self, path: Path) -> bytes:
        # No format that is opened needs more for so many pixels.
        most = _MOST_BYTES_PER_PIXEL * self._max_pixels + _METADATA_BYTES
        with opened_regular_file(path) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise InputError(
                f"{path}: has more than {most} bytes",
                hint="raise max_pixels if you trust the file",
                reason="unsafe",
            )
        return content

    def _picture(self, file: EncodedImage) -> Image.Image:
        with opened_image(file, max_pixels=self._max_pixels) as image:
            return picture_from_image(image, self._preprocessor)

    def _lookup(self, keys: Sequence[str | None]) -> tuple[list[ImageEmbeds | None], list[int]]:
        """What the cache has, and the numbers of the images to encode: one for each new key."""
        if self.cache is None:
            return [None] * len(keys), list(range(len(keys)))
        of_key = {key: self.cache.get(key) for key in dict.fromkeys(keys) if key is not None}
        found = [None if key is None else of_key[key] for key in keys]
        first: dict[str | int, int] = {}
        for index, key in enumerate(keys):
            if found[index] is None:
                first.setdefault(index if key is None else key, index)
        return found, list(first.values())

    def _encode(
        self,
        batch: PackedBatch,
        missing: Sequence[int],
        keys: Sequence[str | None],
        found: list[ImageEmbeds | None],
    ) -> None:
        """Encode a batch of the missing images, and fill them in wherever their key stands."""
        per_image: Sequence[Any]
        failure: NotFiniteError | None = None
        try:
            per_image = batch.grid.split(self.encoder.encode(batch))
        except NotFiniteError as error:
            per_image, failure = error.image_embeds, error
        made: dict[str, ImageEmbeds] = {}
        for index, row, values in zip(missing, batch.grid.tuples(), per_image, strict=True):
            if values is None:
                continue
            embeds = ImageEmbeds.of(np.asarray(values), row)
            found[index] = embeds
            if (key := keys[index]) is not None:
                made[key] = embeds
        for index, key in enumerate(keys):
            if found[index] is None and key is not None:
                found[index] = made.get(key)
        if self.cache is not None and made:
            self.cache.put(made)
        if failure is not None:
            without = [index for index, embeds in enumerate(found) if embeds is None]
            raise NotFiniteError(
                str(failure), images=without, image_embeds=found, hint=failure.hint
            ) from failure


def _named(index: int, step: Callable[[], Any]) -> Any:
    """What a step gives; an error of it says which image it is about."""
    try:
        return step()
    except Exception as error:  # a lazily opened image is decoded here
        raise InputError(
            f"image {index}: {error}",
            hint=getattr(error, "hint", None),
            reason=getattr(error, "reason", None),
        ) from error


def _all_of(found: Sequence[ImageEmbeds | None]) -> list[ImageEmbeds]:
    every = [embeds for embeds in found if embeds is not None]
    assert len(every) == len(found)
    return every
