"""The encoder against the float64 reference, and what it promises about names and batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.config import PRESETS, EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.random_weights import random_state_dict
from tests.support.configs import (
    GRIDS,
    HEAD_DIM_48,
    HEAD_DIM_64,
    HEAD_DIM_80,
    arrays,
    batch,
    grids,
    relative_l2,
)


def run(encoder: VisionEncoderModule, pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        out: np.ndarray = encoder(
            torch.from_numpy(pixels).to(encoder.dtype), torch.from_numpy(grid)
        ).numpy()
    return out


@pytest.mark.parametrize("config", [HEAD_DIM_80, HEAD_DIM_64, HEAD_DIM_48], ids=["80", "64", "48"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_float64_encoder_is_the_reference(
    config: EncoderConfig, grid: list[tuple[int, int, int]]
) -> None:
    state = random_state_dict(config, seed=1, dtype=torch.float64)
    pixels, rows = batch(grid, config)
    expected = reference.vision_encoder(arrays(state), pixels, rows, config)
    assert relative_l2(run(encoder_from_state_dict(config, state), pixels, rows), expected) < 1e-13


@pytest.mark.parametrize("name", ["q_proj.bias", "layer_norm1.weight", "geometry"])
def test_the_comparison_can_fail(name: str) -> None:
    state = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64)
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    expected = reference.vision_encoder(arrays(state), pixels, rows, HEAD_DIM_80)
    if name == "geometry":
        rows = rows[::-1].copy()
    else:
        key = next(key for key in state if key.endswith(name))
        state = {**state, key: state[key] * 1.01}
    assert (
        relative_l2(run(encoder_from_state_dict(HEAD_DIM_80, state), pixels, rows), expected) > 1e-6
    )


@settings(max_examples=25)
@given(grids())
def test_a_packed_batch_is_its_images_one_by_one(grid: list[tuple[int, int, int]]) -> None:
    encoder = encoder_from_state_dict(
        HEAD_DIM_80, random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64)
    )
    pixels, rows = batch(grid, HEAD_DIM_80)
    bounds = np.cumsum([0, *rows.prod(axis=1)])
    pieces = [
        run(encoder, pixels[a:b], rows[i : i + 1])
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    np.testing.assert_allclose(
        run(encoder, pixels, rows), np.concatenate(pieces), rtol=0, atol=1e-12
    )


def test_half_precision_keeps_the_angles_in_float32() -> None:
    config = HEAD_DIM_80
    geometry = VisionEncoderModule(config).half().vision_tower.vision_model.geometry
    grid = torch.tensor([[1, 200, 2]])
    _, cos, _ = geometry(grid, 400, torch.float32)
    assert cos.dtype == torch.float32
    angles = reference.rotary_angles(reference.patch_positions(1, 200, 2, 2), config)
    # The angle is rounded to float32, 2**-24 of at most 200 radians.
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 200 * 2.0**-23


def test_full_preset_has_the_released_size_and_names() -> None:
    with torch.device("meta"):
        encoder = VisionEncoderModule(PRESETS["full"])
    parameters = dict(encoder.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 865_567_232
    assert parameters["vision_tower.vision_model.embeddings.patch_embedding.weight"].shape == (
        1280,
        1176,
    )
    assert parameters[
        "vision_tower.vision_model.encoder.layers.31.self_attn.out_proj.bias"
    ].shape == (1280,)
    assert parameters["patch_merge_mlp.linear_1.weight"].shape == (6144, 24576)
    assert not list(encoder.buffers())


def test_random_weights_keep_activations_in_range_through_the_depth() -> None:
    """Narrow, but as deep as the released tower: the residual stream neither fades nor grows."""
    import dataclasses

    config = dataclasses.replace(HEAD_DIM_80, num_hidden_layers=32)
    encoder = encoder_from_state_dict(
        config, random_state_dict(config, seed=0, dtype=torch.float32)
    )
    spread: list[float] = []
    for layer in encoder.vision_tower.vision_model.encoder.layers:
        layer.register_forward_hook(
            lambda _module, _inputs, output: spread.append(float(output.std()))
        )
    pixels, rows = batch(GRIDS["single"], config)
    out = run(encoder, pixels, rows)
    assert len(spread) == 32
    assert min(spread) > 0.5
    assert max(spread) < 4
    assert 0.01 < out.std() < 10


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float32)
    again = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float32)
    other = random_state_dict(HEAD_DIM_80, seed=2, dtype=torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    half = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.bfloat16)
    assert all(torch.equal(first[name].bfloat16(), half[name]) for name in first)
