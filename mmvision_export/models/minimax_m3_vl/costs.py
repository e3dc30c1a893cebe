"""How much work a batch is, counted from the encoder's dimensions: the one count of the package.

The planner of launches and the benchmark's roofline both ask here. A test holds it equal to a count
over the nodes of the exported graph.
"""

from __future__ import annotations

import dataclasses
import functools

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["FLOOR_PATCHES", "Costs", "Product", "products_of"]

FLOOR_PATCHES = 256
"""A launch of fewer patches takes as long as one of this many: it reads every weight once, two bytes for
the two operations per patch, and GPUs from Orin to H100 do 150 to 420 float16 operations in the time of
reading one byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One kind of matrix product with a weight `[columns_in, columns_out]`.

    Attributes:
        part: Part of the encoder it belongs to.
        columns_in: Columns of its input.
        columns_out: Columns of its output.
        times: How often the encoder has it.
        per_token: Whether it has one row for an image token, rather than for a patch.
    """

    part: str
    columns_in: int
    columns_out: int
    times: int = 1
    per_token: bool = False


def products_of(config: EncoderConfig) -> list[Product]:
    """Every matrix product with a weight, in the encoder's order."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    text, projector = config.text_hidden_size, config.projector_hidden_size
    merged = config.patches_per_token * text
    projections, mlp = "attention projections", "MLP"
    return [
        Product(part="patch embedding", columns_in=config.patch_dim, columns_out=hidden),
        Product(part=projections, columns_in=hidden, columns_out=hidden, times=4 * layers),
        Product(part=mlp, columns_in=hidden, columns_out=inner, times=layers),
        Product(part=mlp, columns_in=inner, columns_out=hidden, times=layers),
        Product(part="projector", columns_in=hidden, columns_out=projector),
        Product(part="projector", columns_in=projector, columns_out=text),
        Product(part="merger", columns_in=merged, columns_out=projector, per_token=True),
        Product(part="merger", columns_in=projector, columns_out=text, per_token=True),
    ]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Operations of a launch; a multiplication and an addition are two.

    Attributes:
        config: The encoder's dimensions.
        masked: Whether attention is one masked product over the whole launch, N^2, or stays within
            segments.
    """

    config: EncoderConfig
    masked: bool

    @functools.cached_property
    def per_token(self) -> int:
        """Of everything but attention, for the patches of one image token."""
        patches = self.config.patches_per_token
        return sum(
            2 * (1 if p.per_token else patches) * p.times * p.columns_in * p.columns_out
            for p in products_of(self.config)
        )

    def attention(self, squares: int) -> int:
        """Of q @ k and weights @ v in every layer, for so many pairs of a query and a key."""
        return 4 * self.config.hidden_size * self.config.num_hidden_layers * squares

    def of(self, patches: int, squares: int) -> int:
        """Of one launch.

        Args:
            patches: In all, padding included.
            squares: Sum over segments of their patches squared, padding included.
        """
        tokens = max(patches, FLOOR_PATCHES) // self.config.patches_per_token
        return tokens * self.per_token + self.attention(patches**2 if self.masked else squares)

    def uniform(self, slots: int, slot_patches: int) -> int:
        """Of one launch of slots of one length, each of which attends to itself alone.

        Args:
            slots: In all, unused ones included.
            slot_patches: Of each, padding included.
        """
        patches = slots * slot_patches
        tokens = max(patches, FLOOR_PATCHES) // self.config.patches_per_token
        return tokens * self.per_token + self.attention(patches * slot_patches)
