"""Image files to pictures of the size that the encoder sees, on several threads.

A JPEG much larger than its picture may be decoded at a half, a quarter or an eighth of its size
(draft decoding): its blocks of 8 x 8 pixels are then transformed into smaller ones. The grid stays
that of the full size; levels differ by less than one on average (docs/runtime.md has the figures).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

from mmvision_export.core.ahead import mapped, worker_threads
from mmvision_export.models.minimax_m3_vl.images import (
    MAX_FILE_PIXELS,
    EncodedImage,
    opened_image,
)
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.pixels import rgb_from_image, transposition_of
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PreprocessorConfig,
    batch_from_pictures,
    picture_from_image,
    resized,
)

__all__ = ["DRAFT_GAP", "ImageDecoder"]

DRAFT_GAP = 2
"""A draft is at least so many times larger than its picture, in each direction."""

_TURNED = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}


class ImageDecoder:
    """Makes pictures and batches of image files. Safe for use by several threads."""

    def __init__(
        self, config: PreprocessorConfig, *, max_pixels: int = MAX_FILE_PIXELS, draft: bool = True
    ) -> None:
        """Hold the options.

        Args:
            config: The preprocessing.
            max_pixels: Most pixels of one file, and of those that are decoded at one time.
            draft: Use draft decoding.
        """
        self._config = config
        self._max_pixels = max_pixels
        self._draft = draft
        self._free_pixels = max_pixels
        self._changed = threading.Condition()

    def picture(self, source: Path | EncodedImage) -> Image.Image:
        """One file as 8-bit RGB of the size that its grid says.

        Raises:
            InputError: See `opened_image` and `picture_from_image`; it names the file.
        """
        with opened_image(source, max_pixels=self._max_pixels) as image:
            drafted = self._drafted_picture(image) if self._draft else None
            if drafted is not None:
                return drafted
            with self._taking(image.width * image.height):
                return picture_from_image(image, self._config)

    def batch(
        self,
        paths: Sequence[Path | EncodedImage],
        *,
        dtype: npt.DTypeLike = np.float32,
        threads: int | None = None,
    ) -> PackedBatch:
        """Several files as one batch; no more are decoded at one time than there are threads.

        Args:
            paths: The files.
            dtype: See `batch_from_pictures`.
            threads: Of decoding; `worker_threads()` if None.

        Raises:
            InputError: There are none, or one cannot be used, which it names.
        """
        pictures = mapped(self.picture, paths, threads=threads or worker_threads())
        return batch_from_pictures(pictures, self._config, dtype=dtype)

    def _drafted_picture(self, image: Image.Image) -> Image.Image | None:
        """The picture by way of a draft, or None where no draft is large enough."""
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            return None
        method = transposition_of(image)
        size = image.size
        width, height = size if method not in _TURNED else size[::-1]
        height, width = resized(height, width, self._config)
        # As the file has it, before it is turned upright.
        wanted = (width, height) if method not in _TURNED else (height, width)
        least = (DRAFT_GAP * wanted[0], DRAFT_GAP * wanted[1])
        if min(size[0] // least[0], size[1] // least[1]) < 2:
            return None
        draft = image.draft(None, least)
        if draft is None:
            return None
        with self._taking(image.width * image.height):
            image.load()
            picture = rgb_from_image(image).resize(wanted, Image.Resampling.BICUBIC, box=draft[1])
        return picture if method is None else picture.transpose(method)

    @contextlib.contextmanager
    def _taking(self, pixels: int) -> Iterator[None]:
        """Wait until so many more pixels may be decoded, for the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free_pixels >= pixels)
            self._free_pixels -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free_pixels += pixels
                self._changed.notify_all()
