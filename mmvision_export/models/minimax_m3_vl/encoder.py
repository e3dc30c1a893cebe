"""The MiniMax-M3-VL vision encoder as PyTorch modules: tower, projector and patch merger.

Parameter names are the released checkpoint's, so a state dict of it loads as it is, but for the
patch embedding, whose convolution kernel is flattened: with kernel == stride it is exactly one
matrix product, and is exported as one.

The same forward runs eagerly and is traced for export; there is no second path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.positions import (
    cu_seqlens_from_grid,
    inverse_frequencies,
    positions_from_grid,
)
from mmvision_export.ops.qk_rotary_embedding.torch_op import qk_rotary_embedding
from mmvision_export.ops.varlen_attention.torch_op import varlen_attention

__all__ = ["VisionEncoderModule"]


class SelfAttention(nn.Module):
    """Multi-head attention over a packed sequence, with 3D RoPE on q and k."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        # [N, hidden] -> [N, heads, head_dim]
        q = self.q_proj(x).view(-1, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(-1, self.num_heads, self.head_dim)
        v = self.v_proj(x).view(-1, self.num_heads, self.head_dim)
        q, k = qk_rotary_embedding(q, k, cos, sin)
        attended = varlen_attention(q, k, v, cu_seqlens, self.head_dim**-0.5)
        # [N, heads, head_dim] -> [N, hidden]
        return self.out_proj(attended.view(-1, self.num_heads * self.head_dim))


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact GELU."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cos, sin, cu_seqlens)
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patch embedding: `[N, patch_dim] -> [N, hidden]`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patch_embedding(pixel_values)


class Layers(nn.Module):
    """The stack of layers, a module of its own because the checkpoint's names have it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens)
        return x


class PatchGeometry(nn.Module):
    """Where each patch stands.

    The bounds of its image in the packed sequence, and its rotary angles.

    Everything that depends on `grid_thw` and nothing that depends on pixels. The angles and their
    cos and sin are float32 whatever the encoder's dtype (float64 in the float64 encoder).
    """

    # Not a buffer, which `module.half()` would round: a plain attribute, which the export makes a
    # constant.
    inverse_frequencies: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # Made on the CPU even while the module is being built on the meta device.
        with torch.device("cpu"):
            self.inverse_frequencies = inverse_frequencies(config)
        self.spatial_merge_size = config.spatial_merge_size

    def forward(
        self, grid_thw: Tensor, num_patches: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        grid = grid_thw.to(torch.int32)
        cu_seqlens = cu_seqlens_from_grid(grid)
        positions = positions_from_grid(grid, cu_seqlens, num_patches, self.spatial_merge_size)
        # [N, 3, 1] * [axis_dim/2] -> [N, 3, axis_dim/2] -> [N, rope_dim/2]
        frequencies = self.inverse_frequencies.to(device=positions.device, dtype=dtype)
        angles = (positions[:, :, None].to(dtype) * frequencies).flatten(1)
        return cu_seqlens, angles.cos(), angles.sin()


class VisionTransformer(nn.Module):
    """Patches to hidden states, one packed sequence for all images of the batch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.geometry = PatchGeometry(config)
        # The name is spelt so in the checkpoint.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Layers(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        angle_dtype = torch.promote_types(pixel_values.dtype, torch.float32)
        cu_seqlens, cos, sin = self.geometry(grid_thw, pixel_values.shape[0], angle_dtype)
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.encoder(x, cos, sin, cu_seqlens)


class VisionTower(nn.Module):
    """Holds `vision_model`, as the checkpoint's names have it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        return self.vision_model(pixel_values, grid_thw)


class TwoLayerMLP(nn.Module):
    """`linear_2(gelu(linear_1(x)))`: the projector, per patch, and the merger, per image token."""

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class VisionEncoderModule(nn.Module):
    """The encoder: patches and their grid in, image tokens out.

    Call:
        pixel_values: `[num_patches, patch_dim]` float, a patch flattened in (channel, frame, row,
            column) order.
        grid_thw: `[num_images, 3]` int64 rows (t, h, w), in patches, adding up to num_patches.

    Returns:
        image_embeds: `[num_patches / merge**2, text_hidden_size]`, in the dtype of pixel_values.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = TwoLayerMLP(
            config.hidden_size,
            config.projector_hidden_size,
            config.text_hidden_size,
            bias=config.projector_bias,
        )
        self.patch_merge_mlp = TwoLayerMLP(
            config.patches_per_token * config.text_hidden_size,
            config.projector_hidden_size,
            config.text_hidden_size,
            bias=config.merger_bias,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.multi_modal_projector.linear_1.weight.dtype

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        # A bfloat16 encoder takes float32, since NumPy has no bfloat16; for the others both casts
        # are nothing.
        x = self.vision_tower(pixel_values.to(self.dtype), grid_thw)
        x = self.multi_modal_projector(x)
        # [N, text_hidden] -> [N / merge**2, merge**2 * text_hidden]
        x = x.view(-1, self.config.patches_per_token * self.config.text_hidden_size)
        return self.patch_merge_mlp(x).to(pixel_values.dtype)
