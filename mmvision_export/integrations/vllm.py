"""Embeddings for vLLM, which then runs no vision encoder of its own. For vLLM 0.33.

Two ways, for two model classes:

* `write_encoder_cache` writes what the example connector of the encoder cache
  (`ECExampleConnector`) reads, for the multimodal class.
* `embeds_prompt` builds a prompt of token ids and embeddings, for the text-only class
  (`MiniMaxM3SparseForCausalLM`) with `--enable-prompt-embeds`.

References:
    vllm/distributed/ec_transfer/ec_connector/example_connector.py: names of folder, file, tensor.
    vllm/inputs/llm.py, `EmbedsPrompt`: fields of a mixed prompt.
    vllm/models/minimax_m3/common/mm_preprocess.py: what an image's token becomes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import InputError
from mmvision_export.integrations.image_embeds import ImageEmbeds
from mmvision_export.integrations.m3_tokens import IMAGE, VISION_END, VISION_START

if TYPE_CHECKING:
    import torch

__all__ = ["EmbedsPrompt", "embeds_prompt", "encoder_cache_file", "write_encoder_cache"]

_FILE = "encoder_cache.safetensors"
_TENSOR = "ec_cache"


class EmbedsPrompt(TypedDict):
    """vLLM's own `EmbedsPrompt` of a mixed prompt, which is a dictionary.

    Attributes:
        prompt_token_ids: `[length]`; an image's token at each of its positions.
        prompt_is_token_ids: `[length]`; False where the embedding stands for the token.
        prompt_embeds: `[length, text_hidden_size]` bfloat16 on the CPU; zero where the token id
            counts.
    """

    prompt_token_ids: list[int]
    prompt_is_token_ids: list[bool]
    prompt_embeds: torch.Tensor


def encoder_cache_file(folder: Path, mm_hash: str) -> Path:
    """Where the connector looks for the embeddings of an item.

    Args:
        folder: The connector's `shared_storage_path`.
        mm_hash: The item's identifier in vLLM. It is the UUID that a request gives its image
            (`multi_modal_uuids`), if the request has no processor or media options; else vLLM
            hashes the UUID with those. With LoRA it is `<LoRA's name>:<hash>`.

    Raises:
        InputError: The identifier is no name of a folder. vLLM takes UUIDs as clients give them.
    """
    if mm_hash in ("", ".", "..") or any(character in mm_hash for character in "/\\\0"):
        raise InputError(
            f"mm_hash must be the name of a folder, got {mm_hash!r}",
            hint="give images UUIDs without slashes",
            reason="unsafe",
        )
    return folder / mm_hash / _FILE


def write_encoder_cache(folder: Path, mm_hash: str, embeds: ImageEmbeds) -> Path:
    """Write an image's embeddings where vLLM's example connector reads them.

    The file appears whole: the connector takes a file that exists for one that can be read.

    Args:
        folder: See `encoder_cache_file`.
        mm_hash: See `encoder_cache_file`.
        embeds: `[tokens, text_hidden_size]`.

    Returns:
        The file, with one tensor `ec_cache` in bfloat16.

    Raises:
        InputError: See `encoder_cache_file`.
        OutputError: It cannot be written.
    """
    path = encoder_cache_file(folder, mm_hash)
    header = {
        _TENSOR: {
            "dtype": "BF16",
            "shape": list(embeds.shape),
            "data_offsets": [0, embeds.size_bytes],
        }
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    with new_files(path.parent, name=path.name) as new, (new / path.name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(embeds.bits.astype("<u2", copy=False).data.cast("B"))
    return path


def embeds_prompt(
    token_ids: Sequence[int], images: Sequence[ImageEmbeds], *, placeholder: int = IMAGE
) -> EmbedsPrompt:
    """A prompt of text and images for the text-only model class. Imports torch.

    Each placeholder becomes what vLLM's own M3 processor makes of it: the start token, as many
    placeholders as the image has tokens, and the end token. Start and end stay token ids.

    Args:
        token_ids: The chat template's: one placeholder for each image.
        images: In the order of their placeholders.
        placeholder: The token that stands for an image.

    Raises:
        InputError: There are no images; not as many as placeholders; images of several widths; or
            a placeholder is already between start and end tokens.
    """
    import torch

    if not images:
        raise InputError("no images were given", reason="missing")
    at = [index for index, token in enumerate(token_ids) if token == placeholder]
    if len(at) != len(images):
        raise InputError(
            f"token_ids has {len(at)} tokens {placeholder}, but there are {len(images)} images",
            hint="give one placeholder for each image, as the chat template does",
        )
    if any(index and token_ids[index - 1] == VISION_START for index in at):
        raise InputError(
            f"a token {placeholder} already follows the start token {VISION_START}",
            hint="leave start and end tokens to this function",
        )
    if len(widths := {embeds.shape[1] for embeds in images}) > 1:
        raise InputError(f"images have several widths: {sorted(widths)}")
    ids: list[int] = []
    is_token: list[bool] = []
    spans: list[tuple[int, ImageEmbeds]] = []
    waiting = iter(images)
    for token in token_ids:
        if token != placeholder:
            ids.append(token)
            is_token.append(True)
            continue
        embeds = next(waiting)
        count = embeds.shape[0]
        spans.append((len(ids) + 1, embeds))
        ids += [VISION_START, *[placeholder] * count, VISION_END]
        is_token += [True, *[False] * count, True]
    values = torch.zeros(len(ids), images[0].shape[1], dtype=torch.bfloat16)
    for first, embeds in spans:
        values[first : first + embeds.shape[0]] = embeds.tensor()
    return {
        "prompt_token_ids": ids,
        "prompt_is_token_ids": is_token,
        "prompt_embeds": values,
    }
