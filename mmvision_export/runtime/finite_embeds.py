"""Embeddings that nobody should use, by the images that they are of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import NotFiniteError
from mmvision_export.core.finite import finite_rows
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch

__all__ = ["refuse_not_finite"]


def refuse_not_finite(
    image_embeds: npt.NDArray[np.floating],
    batch: PackedBatch,
    run: Callable[[PackedBatch], npt.NDArray[np.floating]],
) -> None:
    """Refuse embeddings with a NaN or an infinity.

    Masked attention gives keys of other images a weight of 0, and 0 times NaN is NaN: an image may
    only have shared its launch with one that is not finite. So each image that is not finite is run
    again alone, and those that are finite then get what they are alone.

    Args:
        image_embeds: `[num_image_tokens, text_hidden_size]`, the batch's; corrected in place.
        batch: What they are of.
        run: Gives the embeddings of a batch.

    Raises:
        NotFiniteError: Names the images that are not finite even alone, and has the embeddings of
            the others.
    """
    finite = finite_rows(np.ascontiguousarray(image_embeds))
    if finite.all():
        return
    per_image, per_token = batch.grid.split(image_embeds), batch.grid.split(finite)
    images = [image for image, rows in enumerate(per_token) if not rows.all()]
    if len(per_image) > 1:
        for image in images.copy():
            alone = run(batch.images(slice(image, image + 1)))
            if finite_rows(np.ascontiguousarray(alone)).all():
                per_image[image][:] = alone
                images.remove(image)
    if images:
        raise NotFiniteError(
            f"the embeddings are not finite, of image {', '.join(map(str, images))}",
            images=images,
            image_embeds=[
                None if image in images else embeds for image, embeds in enumerate(per_image)
            ],
            hint="check the model with: mmvision parity",
        )
