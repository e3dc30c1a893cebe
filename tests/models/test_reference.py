"""The float64 reference against results that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from mmvision_export.models.minimax_m3_vl import reference
from tests.support.configs import HEAD_DIM_80


def test_positions_follow_merge_blocks() -> None:
    positions = reference.patch_positions(1, 2, 4, 2)
    assert positions.tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1],
        [0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3],
    ]  # fmt: skip
    assert reference.patch_positions(2, 2, 2, 2)[4].tolist() == [1, 0, 0]


def test_attention_to_equal_keys_is_the_mean_of_the_segment() -> None:
    rng = np.random.default_rng(0)
    q, v = rng.standard_normal((2, 7, 2, 16))
    k = np.ones((7, 2, 16))
    out = reference.varlen_attention(q, k, v, [0, 3, 7], scale=0.25)
    np.testing.assert_allclose(out[:3], np.broadcast_to(v[:3].mean(axis=0), (3, 2, 16)), rtol=1e-14)
    np.testing.assert_allclose(out[3:], np.broadcast_to(v[3:].mean(axis=0), (4, 2, 16)), rtol=1e-14)


def test_rows_in_no_segment_are_undefined() -> None:
    q, k, v = np.ones((3, 5, 1, 4))
    out = reference.varlen_attention(q, k, v, [0, 3], scale=1.0)
    assert np.isfinite(out[:3]).all()
    assert np.isnan(out[3:]).all()


def test_rotation_keeps_the_norm_of_each_pair_and_the_channels_beyond() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 2, 80))
    angles = rng.standard_normal((5, 39))
    rotated, _ = reference.qk_rotary_embedding(q, k, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(
        rotated[..., :39] ** 2 + rotated[..., 39:78] ** 2,
        q[..., :39] ** 2 + q[..., 39:78] ** 2,
        rtol=1e-12,
    )
    np.testing.assert_array_equal(rotated[..., 78:], q[..., 78:])
    assert not np.allclose(rotated[..., :78], q[..., :78])


def test_scores_depend_on_relative_positions_only() -> None:
    """What RoPE is for: shifting an image as a whole changes no attention score."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 4, 1, 80))
    positions = reference.patch_positions(1, 2, 2, 2)

    def scores(shift: int) -> np.ndarray:
        angles = reference.rotary_angles(positions + shift, HEAD_DIM_80)
        rotated = reference.qk_rotary_embedding(q, k, np.cos(angles), np.sin(angles))
        result: np.ndarray = np.einsum("qhd,khd->hqk", *rotated)
        return result

    np.testing.assert_allclose(scores(0), scores(11), rtol=1e-12)


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(
        reference.gelu(x), x * (1 + erf(x / np.sqrt(2))) / 2, rtol=1e-13, atol=1e-16
    )
    tanh_form = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert (
        np.abs(reference.gelu(x) - tanh_form).max() > 1e-4
    )  # the control: the approximation is told apart


@pytest.mark.parametrize(
    ("head_dim", "axis_dim", "rope_dim"), [(80, 26, 78), (64, 20, 60), (48, 16, 48)]
)
def test_angles_span_three_axes(head_dim: int, axis_dim: int, rope_dim: int) -> None:
    import dataclasses

    config = dataclasses.replace(HEAD_DIM_80, hidden_size=2 * head_dim)
    assert (config.axis_dim, config.rope_dim) == (axis_dim, rope_dim)
    angles = reference.rotary_angles(np.array([[1, 2, 3]]), config)
    assert angles.shape == (1, rope_dim // 2)
    np.testing.assert_array_equal(
        angles[0, :: axis_dim // 2], [1, 2, 3]
    )  # the first frequency of an axis is 1
