"""Embeddings that nobody should use, by the images that they are of.

Where attention is masked, keys of other images get a weight of 0, and 0 times NaN is NaN: one image
that overflows reaches every image of its launch. Not all of these become NaN. OpenVINO's kernel gives
them finite numbers that are wrong. So what has shared a batch with such an image is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import NotFiniteError
from mmvision_export.core.finite import finite_rows
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid

__all__ = ["refuse_not_finite"]


def refuse_not_finite(
    image_embeds: npt.NDArray[np.floating],
    batch: PackedBatch,
    run: Callable[[PackedBatch], npt.NDArray[np.floating]],
    *,
    is_isolated: bool,
) -> None:
    """Refuse embeddings with a NaN or an infinity.

    Args:
        image_embeds: `[num_image_tokens, text_hidden_size]`, the batch's; where images reach each
            other, corrected in place.
        batch: What they are of.
        run: Gives the embeddings of a batch.
        is_isolated: Whether no image can reach another.

    Raises:
        NotFiniteError: Names the images that are not finite even alone, and has the embeddings of
            the others, as they are without those.
    """
    finite = finite_rows(np.ascontiguousarray(image_embeds))
    if finite.all():
        return
    per_image, per_token = batch.grid.split(image_embeds), batch.grid.split(finite)
    refused = [image for image, rows in enumerate(per_token) if not rows.all()]
    if not is_isolated and len(per_image) > 1:
        refused = [image for image in refused if not _is_finite(run(_only(batch, [image])))]
        others = [image for image in range(len(per_image)) if image not in refused]
        if others:
            again = _only(batch, others)
            for image, embeds in zip(others, again.grid.split(run(again)), strict=True):
                per_image[image][:] = embeds
    if refused:
        raise NotFiniteError(
            f"the embeddings of image {', '.join(map(str, refused))} are not finite",
            images=refused,
            image_embeds=[
                None if image in refused else embeds for image, embeds in enumerate(per_image)
            ],
            hint="check the model with: mmvision parity",
        )


def _is_finite(image_embeds: npt.NDArray[np.floating]) -> bool:
    return bool(finite_rows(np.ascontiguousarray(image_embeds)).all())


def _only(batch: PackedBatch, images: Sequence[int]) -> PackedBatch:
    bounds = batch.grid.bounds
    patches = [batch.pixel_values[bounds[image] : bounds[image + 1]] for image in images]
    rows = batch.grid.rows[list(images)]
    return PackedBatch(np.concatenate(patches), PackedGrid(rows, batch.grid.patches_per_token))
