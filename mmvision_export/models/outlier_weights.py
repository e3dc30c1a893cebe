"""Outliers as trained transformers have them, planted into random weights.

Freshly initialised weights give activations that are all of one size. Those of trained transformers
are not, which is what makes low precision hard. Two phenomena are planted, each in the weights that
produce it in a trained model:

* **Outlier channels**: the same few hidden channels are about 20 times larger than the others at the input of every
  product of every layer, for about three quarters of all tokens. They come from the gain of the
  layer norms.
* **Massive activations**: from the middle of the depth on, a few patches (about 2 %, which ones depends on the image)
  carry values of several hundreds in the same two channels of the residual stream, hundreds of
  times its median. Five neurons of one MLP, which fire for those patches only, write them, and the
  residual connection carries them to the end. After a layer norm they are all but constant, and act
  as a bias.

References:
    Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 4: outlier features reach 20 times
    the size of others, in 75 % of the sequence, magnitude 6 or more, in all layers. Wei et al.
    2022, "Outlier Suppression", arXiv:2209.13325, section 3: the layer norms' gain makes them. Sun
    et al. 2024, "Massive Activations in Large Language Models", arXiv:2402.17762, sections 2 and 5:
    above 100 and up to 1000 times the median, in fixed channels; in vision transformers at patches
    that differ from image to image. Darcet et al. 2023, "Vision Transformers Need Registers",
    arXiv:2309.16588, section 2: 2.37 % of patches, norms about ten times those of others, from the
    middle layers on. Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers",
    arXiv:2506.08010, section 3: about five neurons of one MLP write them.
"""

from __future__ import annotations

import dataclasses
import re
import zlib

import torch
from torch import Tensor

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["Outliers", "plant_outliers"]

OUTLIER_GAIN = 20.0
MASSIVE_CHANNELS = 2
REGISTER_NEURONS = 5
# A neuron's detector is about standard normal over patches: 0.6 % lie above this, and for one of
# five neurons 3 %.
FIRING_THRESHOLD = 2.5
# How steeply a neuron fires, and what it then writes: for a patch half a standard deviation above
# the threshold GELU(4 * 0.5) * 150, which is about 300.
REGISTER_SLOPE = 4.0
REGISTER_WEIGHT = 150.0

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Where the outliers of an encoder are.

    Attributes:
        channels: Hidden channels that every layer norm of a layer amplifies.
        massive_channels: Hidden channels of the massive activations.
        layer: The layer whose MLP writes the massive activations.
        neurons: Its neurons that do.
    """

    channels: list[int]
    massive_channels: list[int]
    layer: int
    neurons: list[int]

    @classmethod
    def of(cls, config: EncoderConfig, *, seed: int) -> Outliers:
        """The positions for a seed: any, but the same in every layer."""
        generator = _generator(f"{seed}/outliers")
        count = max(1, config.hidden_size // 256)
        channels = torch.randperm(config.hidden_size, generator=generator)[
            : count + MASSIVE_CHANNELS
        ].tolist()
        neurons = torch.randperm(config.intermediate_size, generator=generator)[
            :REGISTER_NEURONS
        ].tolist()
        return cls(channels[:count], channels[count:], (config.num_hidden_layers - 1) // 2, neurons)


def plant_outliers(name: str, values: Tensor, config: EncoderConfig, *, seed: int) -> Tensor:
    """A parameter with its share of the outliers; most have none.

    Args:
        name: The parameter's name.
        values: Its plain values, float32; not changed.
        config: The encoder's dimensions.
        seed: Chooses the positions.
    """
    found = _LAYER.search(name)
    if found is None:
        return values
    outliers, values = Outliers.of(config, seed=seed), values.clone()
    layer, parameter = int(found[1]), found[2]
    if parameter in ("layer_norm1.weight", "layer_norm2.weight"):
        values[outliers.channels] = OUTLIER_GAIN
    if layer != outliers.layer:
        return values
    if parameter == "mlp.fc1.weight":
        values[outliers.neurons] = REGISTER_SLOPE * _detectors(config, outliers, seed)
    elif parameter == "mlp.fc1.bias":
        values[outliers.neurons] = -REGISTER_SLOPE * FIRING_THRESHOLD
    elif parameter == "mlp.fc2.weight":
        # One channel of each sign, as published figures show them; the layer norm's mean then stays
        # where it was.
        for channel, sign in zip(outliers.massive_channels, (1, -1), strict=True):
            values[channel, outliers.neurons] = sign * REGISTER_WEIGHT
    return values


def _detectors(config: EncoderConfig, outliers: Outliers, seed: int) -> Tensor:
    """Unit vectors `[5, hidden]`.

    Their products with a layer norm's output are about standard normal over patches.
    """
    directions = torch.randn(
        REGISTER_NEURONS, config.hidden_size, generator=_generator(f"{seed}/detectors")
    )
    directions[:, outliers.channels] = 0
    return torch.nn.functional.normalize(directions)


def _generator(key: str) -> torch.Generator:
    # PyTorch's CPU generator takes 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))
