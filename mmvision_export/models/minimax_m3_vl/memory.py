"""How much memory a launch needs, counted from the encoder's dimensions.

The runtime asks here before a launch, so that one image too many is an error with numbers rather
than the end of the process. A slow test measures the peaks of ONNX Runtime and OpenVINO on a CPU:
these counts are never below them, and at most three times as large. OpenVINO fuses attention, by
the peaks: it never has all scores. ONNX Runtime has them, where attention is masked.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["LaunchBytes", "LaunchMemory", "MemoryWay", "gigabytes"]

MemoryWay = Literal["blocked", "dense", "uniform"]
"""What a graph keeps of a launch of N patches.

`blocked` is the CPU flavour: activations of a block, and what attention reads. `dense` masks one
product of N x N. `uniform` has a product of L x L for each of its slots of L patches.
"""

_BLOCK_PATCHES = 768  # of the CPU flavour
_FLOAT32 = 4
_BOUND_BYTES = 1 + 8  # of one comparison: a Boolean, and the integer that is added up

_SHAPE_BYTES = 16 << 20
"""What a runtime takes for a shape that it has not seen."""


@dataclasses.dataclass(frozen=True)
class LaunchBytes:
    """Bytes that a launch needs, beside the weights and the caller's own arrays.

    Attributes:
        activations: What grows with the number of patches.
        mask: Of attention: which keys a query sees.
        scores: Of attention: a number for each head, query and key.
    """

    activations: int
    mask: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.mask + self.scores

    def __str__(self) -> str:
        parts = {"activations": self.activations, "mask": self.mask, "scores": self.scores}
        shares = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        return f"{gigabytes(self.total)} ({shares})"


def gigabytes(size_bytes: int) -> str:
    """A size for people: `4.71 GB`."""
    return f"{size_bytes / 1e9:.3g} GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchMemory:
    """What launches of one graph need.

    Attributes:
        config: The encoder's dimensions.
        way: How attention is done.
        itemsize: Bytes of an activation.
        fused: Whether attention is one kernel, which never has all scores at once.
    """

    config: EncoderConfig
    way: MemoryWay
    itemsize: int = _FLOAT32
    fused: bool = False

    def of(self, num_patches: int, *, rows: int = 1, slots: int = 1) -> LaunchBytes:
        """Of one launch.

        Args:
            num_patches: In all, padding included.
            rows: Of `grid_thw`.
            slots: Of the way `uniform`, in all.
        """
        # To find a patch's image, its index is compared with the bounds of all.
        activations = num_patches * (self._per_patch + rows * _BOUND_BYTES)
        if self.way == "blocked":
            block = min(num_patches, _BLOCK_PATCHES)
            return LaunchBytes(activations + block * self._inner * self.itemsize)
        length = num_patches // slots
        pairs = slots * length**2
        # A Boolean, and what is added to the scores for it, which a kernel has in part.
        of_pairs = pairs * (2 if self.fused else 1 + self.itemsize)
        mask = slots * length * _FLOAT32 if self.way == "uniform" else of_pairs
        # Of each pair the product, what comes of the mask, and the softmax.
        scores = 0 if self.fused else 3 * self.config.num_attention_heads * pairs * _FLOAT32
        return LaunchBytes(activations + _SHAPE_BYTES, mask, scores)

    def image(self, num_patches: int) -> LaunchBytes:
        """Of one image in a launch of its own."""
        return self.of(num_patches, rows=2 if self.way == "uniform" else 1)

    @property
    def _per_patch(self) -> int:
        """Bytes of activations that are there at once, for each patch."""
        config = self.config
        # cos, sin, their angles and positions, each also in the layout that a product reads.
        geometry = _FLOAT32 * (6 * config.rope_dim + 16)
        tokens = 2 * config.text_hidden_size // config.patches_per_token
        if self.way == "blocked":
            # x, q, k, v of all blocks, and of attention what is read, what is written, and copies.
            kept = 14 * config.hidden_size
            return geometry + self.itemsize * (config.patch_dim + kept + tokens)
        # Arrays of one layer that are not there at once have memory of their own all the same.
        values = config.patch_dim + tokens + 11 * config.hidden_size + self._inner
        # A quarter for what pools of memory round up to.
        return (geometry + self.itemsize * values) * 5 // 4

    @property
    def _inner(self) -> int:
        """Values between two products, for each patch: the widest of MLP, projector and merger."""
        config = self.config
        text, projector = config.text_hidden_size, config.projector_hidden_size
        mlp = 2 * config.intermediate_size + 3 * config.hidden_size
        return max(mlp, 2 * projector + text, 2 * text + 2 * projector // config.patches_per_token)
