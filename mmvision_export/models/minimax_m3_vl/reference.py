"""The model's definition in float64 NumPy.

The bottom rung of the ladder that every other implementation stands on.

Written for reading, one image at a time with plain loops, straight from the definition of the model
and sharing no code with the encoder, the graph or the kernels. It is slow on purpose: it is what
they are compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "gelu",
    "layer_norm",
    "patch_positions",
    "qk_rotary_embedding",
    "varlen_attention",
    "vision_encoder",
]

Array = npt.NDArray[np.float64]
State = Mapping[str, npt.NDArray[np.floating]]


def patch_positions(t: int, h: int, w: int, merge: int) -> npt.NDArray[np.int64]:
    """Position (frame, row, column) of each patch of one image, in merge-block order.

    Frames are outermost, then blocks of merge x merge patches row by row, then the patches inside a
    block.

    Returns:
        `[t*h*w, 3]` int64.
    """
    return np.array(
        [
            (frame, block_row * merge + row, block_column * merge + column)
            for frame in range(t)
            for block_row in range(h // merge)
            for block_column in range(w // merge)
            for row in range(merge)
            for column in range(merge)
        ],
        dtype=np.int64,
    ).reshape(-1, 3)


def rotary_angles(positions: npt.NDArray[np.int64], config: EncoderConfig) -> Array:
    """Rotation angle of each channel pair, in radians: axes t, h, w one after the other.

    The inverse frequencies are float32, which every implementation of the model keeps them in.

    Returns:
        `[num_patches, rope_dim/2]`.
    """
    exponents = np.arange(0, config.axis_dim, 2) / config.axis_dim
    inverse_frequency = (1.0 / config.rope_theta**exponents).astype(np.float32).astype(np.float64)
    # [N, 3, 1] * [axis_dim/2] -> [N, 3, axis_dim/2] -> [N, rope_dim/2]
    angles: Array = (positions[:, :, None] * inverse_frequency).reshape(len(positions), -1)
    return angles


def qk_rotary_embedding(
    q: npt.ArrayLike, k: npt.ArrayLike, cos: npt.ArrayLike, sin: npt.ArrayLike
) -> tuple[Array, Array]:
    """Rotate the first channels of q and k in NeoX pairs (channel i with channel i + rope_dim/2).

    Args:
        q: `[N, heads, head_dim]`.
        k: `[N, heads, head_dim]`.
        cos: `[N, rope_dim/2]`.
        sin: `[N, rope_dim/2]`.

    Returns:
        q and k rotated, same shapes.

    References:
        RoFormer (https://arxiv.org/abs/2104.09864), equation 34, in the half-split pairing of
        GPT-NeoX.
    """
    cos, sin = np.asarray(cos, np.float64), np.asarray(sin, np.float64)

    def rotate(x: npt.ArrayLike) -> Array:
        x = np.asarray(x, np.float64)
        out: Array = x.copy()
        half = cos.shape[1]
        for i in range(half):
            out[..., i] = x[..., i] * cos[:, None, i] - x[..., i + half] * sin[:, None, i]
            out[..., i + half] = x[..., i + half] * cos[:, None, i] + x[..., i] * sin[:, None, i]
        return out

    return rotate(q), rotate(k)


def varlen_attention(
    q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, cu_seqlens: npt.ArrayLike, *, scale: float
) -> Array:
    """Bidirectional softmax attention inside each segment of a packed sequence.

    Args:
        q: `[N, heads, head_dim]`.
        k: `[N, heads, head_dim]`.
        v: `[N, heads, head_dim]`.
        cu_seqlens: `[num_segments + 1]`, ascending from 0; segment s holds rows
            `cu_seqlens[s]:cu_seqlens[s + 1]`.
        scale: Factor on q @ k.

    Returns:
        `[N, heads, head_dim]`; rows beyond `cu_seqlens[-1]` are NaN, since they are not defined.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    bounds = np.asarray(cu_seqlens)
    out: Array = np.full_like(q, np.nan)
    for start, end in itertools.pairwise(bounds):
        scores = np.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[start:end] = np.einsum("hqk,khd->qhd", weights, v[start:end])
    return out


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation of the last axis, biased variance (arXiv:1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    normalised: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return normalised * weight + bias


def gelu(x: Array) -> Array:
    """The exact GELU, `x * Phi(x)` (https://arxiv.org/abs/1606.08415)."""
    # NumPy has no erf.
    erf = np.vectorize(math.erf, otypes=[np.float64])
    result: Array = x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))
    return result


def vision_encoder(
    state: State, pixel_values: npt.ArrayLike, grid_thw: npt.ArrayLike, config: EncoderConfig
) -> Array:
    """The whole encoder in float64.

    Args:
        state: Parameters under the released checkpoint's names.
        pixel_values: `[num_patches, patch_dim]`.
        grid_thw: `[num_images, 3]` rows (t, h, w), in patches.
        config: The dimensions.

    Returns:
        `[num_patches / merge**2, text_hidden_size]`.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    rows = [(int(t), int(h), int(w)) for t, h, w in np.asarray(grid_thw)]
    angles = [
        rotary_angles(patch_positions(*row, config.spatial_merge_size), config) for row in rows
    ]
    cos, sin = np.cos(np.concatenate(angles)), np.sin(np.concatenate(angles))
    cu_seqlens = np.cumsum([0, *(t * h * w for t, h, w in rows)])

    def parameter(name: str) -> Array:
        return np.asarray(state[name], np.float64)

    def linear(x: Array, name: str) -> Array:
        y: Array = x @ parameter(f"{name}.weight").reshape(-1, x.shape[-1]).T
        return y + parameter(f"{name}.bias") if f"{name}.bias" in state else y

    def norm(x: Array, name: str) -> Array:
        return layer_norm(
            x, parameter(f"{name}.weight"), parameter(f"{name}.bias"), config.layer_norm_eps
        )

    tower = "vision_tower.vision_model"
    x = linear(np.asarray(pixel_values, np.float64), f"{tower}.embeddings.patch_embedding")
    x = norm(x, f"{tower}.pre_layrnorm")
    for index in range(config.num_hidden_layers):
        layer = f"{tower}.encoder.layers.{index}"
        y = norm(x, f"{layer}.layer_norm1")
        # [N, hidden] -> [N, heads, head_dim]
        q, k, v = (
            linear(y, f"{layer}.self_attn.{n}_proj").reshape(-1, heads, head_dim) for n in "qkv"
        )
        q, k = qk_rotary_embedding(q, k, cos, sin)
        y = varlen_attention(q, k, v, cu_seqlens, scale=head_dim**-0.5).reshape(
            -1, config.hidden_size
        )
        x = x + linear(y, f"{layer}.self_attn.out_proj")
        y = gelu(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(y, f"{layer}.mlp.fc2")
    for name in ("multi_modal_projector", "patch_merge_mlp"):
        if name == "patch_merge_mlp":
            # [N, text_hidden] -> [N / merge**2, merge**2 * text_hidden]
            x = x.reshape(-1, config.patches_per_token * x.shape[-1])
        x = linear(gelu(linear(x, f"{name}.linear_1")), f"{name}.linear_2")
    return x
