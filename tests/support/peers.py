"""Implementations written by others, on the same weights."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch

from mmvision_export.benchmark.peers import peer_from_encoder
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.random_weights import random_state_dict
from tests.support.configs import HEAD_DIM_64, HEAD_DIM_80

CONFIGS = {"80": HEAD_DIM_80, "64": HEAD_DIM_64}


State = dict[str, torch.Tensor]


@functools.cache
def weights(head_dim: str) -> State:
    return random_state_dict(CONFIGS[head_dim], seed=1, dtype=torch.float32)


def run_peer(
    peer: str, config: EncoderConfig, state: State, pixels: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    if peer.startswith("transformers-") and len(grid) > 1:
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
            MiniMaxM3VLVisionAttention,
        )

        if "cu_seqlens" not in inspect.signature(MiniMaxM3VLVisionAttention.forward).parameters:
            pytest.skip("transformers before 5.23 lets the images of a batch attend to each other")
    if peer == "nemo":
        pytest.importorskip("nemo_automodel", reason="pip install --no-deps nemo-automodel")
    run = peer_from_encoder(peer, encoder_from_state_dict(config, state))
    with torch.inference_mode():
        return run(torch.from_numpy(pixels), torch.from_numpy(grid)).numpy()
