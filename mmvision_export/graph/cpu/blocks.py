"""What the CPU flavour computes in one block of patches: from one attention to the next.

Each function adds nodes to a block's tape. B is the number of patches of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from mmvision_export.graph.cpu.functions import CONTRIB
from mmvision_export.graph.cpu.portable import PortableEncoder
from mmvision_export.graph.naming_tape import NamingTape
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.ops.domain import DOMAIN

__all__ = ["BlockWriter"]


@dataclasses.dataclass(frozen=True)
class BlockWriter:
    """Writes into the body of one `Scan`.

    Attributes:
        tape: Of the body.
        encoder: Whose weights are used.
        config: Its dimensions.
        zero: `[1]` int64, of the graph around the body.
    """

    tape: NamingTape
    encoder: PortableEncoder
    config: EncoderConfig
    zero: ir.Value

    def embed(self, patches: ir.Value) -> ir.Value:
        """`[B, patch_dim] -> [B, hidden]`."""
        embedded = self._linear("embedded", patches, "embeddings.patch_embedding")
        return self._layer_norm("x", embedded, "pre_layrnorm")

    def after_attention(self, x: ir.Value, attended: ir.Value, layer: str) -> ir.Value:
        """The rest of a layer: `[B, hidden] -> [B, hidden]`."""
        projected = self._linear("projected", attended, f"{layer}.self_attn.out_proj")
        between = self.tape.op("between", "Add", x, projected)
        normed = self._layer_norm("between_normed", between, f"{layer}.layer_norm2")
        activated = self._linear_gelu("activated", normed, f"{layer}.mlp.fc1")
        outer = self._linear("outer", activated, f"{layer}.mlp.fc2")
        return self.tape.op("x", "Add", between, outer)

    def before_attention(
        self, x: ir.Value, cos: ir.Value, sin: ir.Value, layer: str
    ) -> Sequence[ir.Value]:
        """q, k, v `[B, hidden]` of x `[B, hidden]`; q and k rotated."""
        normed = self._layer_norm("normed", x, f"{layer}.layer_norm1")
        q_flat = self._linear("q_flat", normed, f"{layer}.self_attn.q_proj")
        k_flat = self._linear("k_flat", normed, f"{layer}.self_attn.k_proj")
        v = self._linear("v", normed, f"{layer}.self_attn.v_proj")
        # [B, hidden] -> [1, B, hidden], and back.
        q_batch = self.tape.op("q_batch", "Unsqueeze", q_flat, self.zero)
        k_batch = self.tape.op("k_batch", "Unsqueeze", k_flat, self.zero)
        q_rotated = self._rotate("q_rotated", q_batch, cos, sin)
        k_rotated = self._rotate("k_rotated", k_batch, cos, sin)
        q = self.tape.op("q", "Squeeze", q_rotated, self.zero)
        k = self.tape.op("k", "Squeeze", k_rotated, self.zero)
        return q, k, v

    def project(self, x: ir.Value, merged: ir.Value) -> ir.Value:
        """Patches to image tokens: `[B, hidden] -> [B / merge**2, text_hidden]`.

        In the block too: what a token is made of is nineteen times as wide as a patch's features.

        Args:
            x: The last layer's result.
            merged: The shape `(-1, merge**2 * text_hidden)`.
        """
        activated = self._linear_gelu("proj_activated", x, "multi_modal_projector.linear_1")
        projected = self._linear("projected_out", activated, "multi_modal_projector.linear_2")
        rows = self.tape.op("token_rows", "Reshape", projected, merged)
        activated = self._linear_gelu("merge_activated", rows, "patch_merge_mlp.linear_1")
        return self._linear("tokens", activated, "patch_merge_mlp.linear_2")

    def _linear(self, name: str, x: ir.Value, module: str) -> ir.Value:
        return self.tape.op(name, "Linear", x, *self.encoder.parameters(module), domain=DOMAIN)

    def _linear_gelu(self, name: str, x: ir.Value, module: str) -> ir.Value:
        parameters = self.encoder.parameters(module)
        y = self.tape.op(name, "LinearGelu", x, *parameters, domain=DOMAIN)
        # The checker does not know what comes out of `com.microsoft::Gelu`, in the definition.
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
        return y

    def _layer_norm(self, name: str, x: ir.Value, module: str) -> ir.Value:
        return self.tape.op(
            name,
            "LayerNormalization",
            x,
            *self.encoder.parameters(module),
            axis=-1,
            epsilon=self.config.layer_norm_eps,
        )

    def _rotate(self, name: str, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        # Positions from 0 on: cos and sin are those of the block's own rows.
        return self.tape.op(
            name,
            "RotaryEmbedding",
            x,
            self.zero,
            cos,
            sin,
            domain=CONTRIB,
            num_heads=self.config.num_attention_heads,
            rotary_embedding_dim=self.config.rope_dim,
        )
