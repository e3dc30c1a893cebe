"""SGLang's MiniMax-M3-VL for `--encoder-only`, with its vision tower left out and ours called.

SGLang warns and goes on with its own model where this module cannot be imported: look for
`Ignore import error when loading mmvision_export` in its log.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration as Theirs
from torch import nn

from mmvision_export.core.errors import ConfigError
from mmvision_export.integrations.settings import embedder_from_environment
from mmvision_export.integrations.sglang import features_of_items

__all__ = ["EntryClass", "MiniMaxM3SparseForConditionalGeneration"]


class MiniMaxM3SparseForConditionalGeneration(Theirs):  # type: ignore[misc]
    """Has the name of theirs, which is how SGLang finds it; builds nothing of theirs."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        """Open the encoder that `MMVISION_MODEL` names.

        Raises:
            ConfigError: Not `--encoder-only`, or the encoder is of another language model.
        """
        nn.Module.__init__(self)
        if not config.encoder_only:
            raise ConfigError(
                "this model class encodes images only and has no language model",
                hint="start SGLang with --encoder-only, or unset SGLANG_EXTERNAL_MODEL_PACKAGE",
            )
        from sglang.srt.managers.tokenizer_manager import get_processor_wrapper

        self.config = config
        self.quant_config = quant_config
        self.num_fused_shared_experts = 0
        self.encoder_processor = get_processor_wrapper()
        self.model = None
        self.lm_head = None
        self.logits_processor = None
        self.embedder = embedder_from_environment()
        ours, wanted = self.embedder.encoder.config, config.text_config.hidden_size
        if ours.text_hidden_size != wanted:
            raise ConfigError(
                f"the encoder's text_hidden_size is {ours.text_hidden_size}, the model's {wanted}"
            )
        # The server takes the embeddings' type and device from the first parameter.
        self.like = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16), requires_grad=False)

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        """`[image tokens, text_hidden_size]` bfloat16 of all items."""
        return features_of_items(self.embedder, items, "image_grid_thw").to(self.like.device)

    def get_video_feature(self, items: list[Any]) -> torch.Tensor:
        """As `get_image_feature`, of videos."""
        return features_of_items(self.embedder, items, "video_grid_thw").to(self.like.device)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Read nothing of the checkpoint: the weights are in the model directory."""

    def precompile_kernels_after_loading(self) -> None:
        """Nothing: there is no language model."""


EntryClass = MiniMaxM3SparseForConditionalGeneration
