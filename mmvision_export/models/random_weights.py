"""Seeded random weights, for trying everything without a checkpoint.

Initialised so that activations stay in a realistic range through all 32 layers: every product keeps
the variance of its input, and each residual branch is damped so that the residual stream's variance
doubles over the whole depth, not at every layer (GPT-2's rule,
https://openai.com/research/better-language-models, section 2.3). Values are rounded to bfloat16,
the type the released weights are stored in.

Two kinds: `plain`, and `outliers`, in which trained transformers' outlier channels and massive
activations are planted (`outlier_weights`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.outlier_weights import plant_outliers
from mmvision_export.models.random_kind import RandomKind

__all__ = ["random_state_dict", "random_tensors"]

_RESIDUAL_BRANCH_ENDS = ("self_attn.out_proj.weight", "mlp.fc2.weight")


def random_tensors(
    config: EncoderConfig, *, seed: int, kind: RandomKind = "plain"
) -> Iterator[tuple[str, Tensor]]:
    """Name and bfloat16 values of every parameter of the encoder, made one at a time.

    Each tensor depends on the seed and its own name only, so that the same seed gives the same
    weights whatever else the encoder has.

    Args:
        config: The dimensions.
        seed: Any integer.
        kind: `plain`, or `outliers`.
    """
    with torch.device("meta"):
        parameters = dict(VisionEncoderModule(config).named_parameters())
    for name, parameter in parameters.items():
        values = _random(name, parameter.shape, config, seed)
        if kind == "outliers":
            values = plant_outliers(name, values, config, seed=seed)
        yield name, values.to(torch.bfloat16)


def random_state_dict(
    config: EncoderConfig, *, seed: int, dtype: torch.dtype, kind: RandomKind = "plain"
) -> dict[str, Tensor]:
    """A state dict of `random_tensors`, converted: exactly, but where float16's exponent ends."""
    return {name: tensor.to(dtype) for name, tensor in random_tensors(config, seed=seed, kind=kind)}


def _random(name: str, shape: torch.Size, config: EncoderConfig, seed: int) -> Tensor:
    # PyTorch's CPU generator takes 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        values *= shape[1] ** -0.5
        if name.endswith(_RESIDUAL_BRANCH_ENDS):
            values *= (2 * config.num_hidden_layers) ** -0.5
    elif name.endswith("weight"):  # of a layer norm
        values = 1.0 + 0.1 * values
    else:
        values *= 0.02
    return values
