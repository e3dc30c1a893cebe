"""A `VisionEncoderBackend` for Dynamo's `--custom-encoder-class`. For ai-dynamo 1.6.1.

```
MMVISION_MODEL=engines/MiniMax-M3 python -m dynamo.vllm --enable-multimodal --enable-prompt-embeds \
    --custom-encoder-class mmvision_export.integrations.dynamo.MiniMaxM3Encoder ...
```

Dynamo takes such an encoder with a text-only language model class. It packs images by cost, which
is their patches here; the engine's own buckets are filled by the launch planner.

References:
    dynamo/vllm/multimodal_utils/custom_encoder/backend/base.py: the contract.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from dynamo.vllm.multimodal_utils.custom_encoder.backend import (
    Preprocessed,
    VisionEncoderBackend,
)

from mmvision_export.core.ahead import worker_threads
from mmvision_export.core.errors import InputError, MmvisionError
from mmvision_export.integrations.image_embedder import ImageEmbedder, PreparedImage
from mmvision_export.integrations.m3_tokens import IMAGE
from mmvision_export.integrations.settings import embedder_from_environment, positive_number

if TYPE_CHECKING:
    import torch

__all__ = ["MiniMaxM3Encoder"]

_MOST_BATCH_PATCHES = 16384
_MOST_IMAGE_BYTES = 64 << 20
_SECONDS = 20.0
_logger = logging.getLogger(__name__)


class MiniMaxM3Encoder(VisionEncoderBackend):  # type: ignore[misc]
    """Images by `data:` URL, and by `http` where `MMVISION_ALLOW_HTTP=1` allows it.

    Attributes:
        image_token_id: The placeholder that Dynamo replaces by embeddings.
        max_batch_cost: Patches of one batch, from `MMVISION_MAX_BATCH_PATCHES`. Dynamo reads it
            before the engine is open. A batch larger than the engine's is cut by the planner.
        preprocess_concurrency: Threads that decode and resize.
    """

    image_token_id = IMAGE

    def __init__(self) -> None:
        self.max_batch_cost = positive_number(
            "MMVISION_MAX_BATCH_PATCHES", default=_MOST_BATCH_PATCHES
        )
        self.preprocess_concurrency = worker_threads()
        self._embedder: ImageEmbedder | None = None

    def build(self, model_id: str) -> None:
        """Open the encoder that `MMVISION_MODEL` names; `model_id` is the language model's."""
        self._embedder = embedder_from_environment()

    def preprocess(self, raw: str) -> Any:
        """An image's patches, at the cost of their number.

        Raises:
            ValueError: The image cannot be fetched or read. Dynamo shows the message to the client,
                so that it has nothing of this machine.
        """
        content = _fetched(raw)
        try:
            image = self._opened().prepare(content)
        except InputError as error:
            _logger.info("image refused: %s", error)
            raise ValueError("the image cannot be read, or is too large") from error
        return Preprocessed(item=image, cost=image.num_patches)

    def forward_batch(
        self, items: list[PreparedImage], target_bucket: int | None = None
    ) -> list[torch.Tensor]:
        """One `[tokens, text_hidden_size]` bfloat16 tensor on the CPU for each image, in order.

        Raises:
            RuntimeError: The engine failed. Not a `ValueError`: the batch has images of several
                clients, none of which is at fault.
        """
        try:
            embeds = self._opened().encode_prepared(items)
        except MmvisionError as error:
            raise RuntimeError(str(error)) from error
        return [each.tensor() for each in embeds]

    def close(self) -> None:
        """Close the encoder; nothing if it is not open."""
        if self._embedder is not None:
            self._embedder.encoder.close()
            self._embedder = None

    def _opened(self) -> ImageEmbedder:
        if self._embedder is None:
            raise RuntimeError("the encoder is not open: build() comes first")
        return self._embedder


def _fetched(url: str) -> bytes:
    """The bytes of an image file.

    Raises:
        ValueError: The URL is of a kind that is not allowed, malformed, or too large.
    """
    kind, _, rest = url.partition(":")
    if kind == "data":
        head, comma, body = rest.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("a data URL must be base64")
        try:
            content = base64.b64decode(urllib.parse.unquote(body), validate=True)
        except binascii.Error as error:
            raise ValueError("a data URL holds no base64") from error
    elif kind in ("http", "https") and os.environ.get("MMVISION_ALLOW_HTTP") == "1":
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 - checked
                content = answer.read(_MOST_IMAGE_BYTES + 1)
        except OSError as error:
            _logger.info("image not fetched: %s", error)
            raise ValueError("the image cannot be fetched") from error
    else:
        raise ValueError("images are taken as data URLs only")
    if len(content) > _MOST_IMAGE_BYTES:
        raise ValueError(f"the image has more than {_MOST_IMAGE_BYTES} bytes")
    return content
