"""The planted outliers, measured, with plain random weights as the control."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.config import PRESETS, EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import EncoderLayer
from mmvision_export.models.outlier_weights import Outliers
from mmvision_export.models.random_kind import RandomKind
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.sample_batches import CHECK_GRIDS, sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.samples import samples_from_grids
from tests.support.configs import HEAD_DIM_80

NARROW = dataclasses.replace(HEAD_DIM_80, num_hidden_layers=6)
CONFIGS = pytest.mark.parametrize("config", [NARROW, PRESETS["tiny"]], ids=["narrow", "tiny"])
SEED = 3
GRID = ((1, 16, 16), (1, 9, 7))  # 1276 patches


def activations(
    config: EncoderConfig, kind: RandomKind, pixels: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer, the output `[N, hidden]` and that of its first layer norm."""
    encoder = encoder_from_state_dict(
        config, random_state_dict(config, seed=SEED, dtype=torch.float32, kind=kind)
    )
    hidden: list[Tensor] = []
    normalised: list[Tensor] = []
    for layer in encoder.vision_tower.vision_model.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        layer.layer_norm1.register_forward_hook(
            lambda _module, _inputs, output: normalised.append(output)
        )
    pixel_values, grid_thw = sample_batch(GRID, config, seed=pixels)
    with torch.inference_mode():
        out = encoder(torch.from_numpy(pixel_values), torch.from_numpy(grid_thw))
    assert out.isfinite().all()
    return hidden, normalised


def amplified_channels(normalised: Tensor) -> list[int]:
    """Channels at least 8 times as large as the median channel, for the median patch."""
    size = normalised.abs().median(dim=0).values
    return sorted((size > 8 * size.median()).nonzero().flatten().tolist())


@CONFIGS
def test_a_few_channels_are_amplified_in_every_layer(config: EncoderConfig) -> None:
    outliers = Outliers.of(config, seed=SEED)
    assert len(outliers.channels) / config.hidden_size < 0.01
    _, normalised = activations(config, "outliers")
    for layer in normalised:
        assert amplified_channels(layer) == sorted(outliers.channels)
        assert (layer[:, outliers.channels].abs() >= 6).float().mean() > 0.5
    _, plain = activations(config, "plain")
    assert not any(amplified_channels(layer) for layer in plain)


@CONFIGS
def test_massive_activations_are_few_huge_and_begin_in_the_middle(config: EncoderConfig) -> None:
    outliers = Outliers.of(config, seed=SEED)
    hidden, normalised = activations(config, "outliers")
    for index, layer in enumerate(hidden):
        massive = layer.abs() > 100
        if index < outliers.layer:
            assert not massive.any()
            continue
        assert sorted(massive.any(dim=0).nonzero().flatten().tolist()) == sorted(
            outliers.massive_channels
        )
        assert 0.001 < massive.any(dim=1).float().mean() < 0.05
        assert layer.abs().max() > 150 * layer.abs().median()
        norms = layer.norm(dim=1)
        assert norms.max() > 8 * norms.median()
    assert 0 < outliers.layer <= config.num_hidden_layers / 2

    # Seen through the next layer norm they hardly vary: the largest size its unit variance allows.
    large = hidden[outliers.layer].abs()[:, outliers.massive_channels].amin(dim=1) > 150
    seen = normalised[outliers.layer + 1][large][:, outliers.massive_channels]
    assert (seen.std(dim=0) < 0.1 * seen.mean(dim=0).abs()).all()
    assert (seen.mean(dim=0).abs() > 0.5 * (config.hidden_size / 2) ** 0.5).all()

    plain, _ = activations(config, "plain")
    assert max(float(layer.abs().max()) for layer in plain) < 20


def test_which_patches_depends_on_the_image() -> None:
    def massive_patches(pixels: int) -> set[int]:
        last = activations(NARROW, "outliers", pixels)[0][-1]
        return set((last.abs() > 100).any(dim=1).nonzero().flatten().tolist())

    assert massive_patches(0)
    assert massive_patches(0) != massive_patches(1)


def test_all_other_weights_are_those_of_plain() -> None:
    plain = random_state_dict(NARROW, seed=SEED, dtype=torch.float32)
    outliers = random_state_dict(NARROW, seed=SEED, dtype=torch.float32, kind="outliers")
    differing = {name for name in plain if not torch.equal(plain[name], outliers[name])}
    register = f"layers.{Outliers.of(NARROW, seed=SEED).layer}.mlp."
    assert all("layer_norm" in name or register in name for name in differing)
    assert len(differing) == 2 * NARROW.num_hidden_layers + 3
    assert (
        Outliers.of(NARROW, seed=SEED)
        == Outliers.of(NARROW, seed=SEED)
        != Outliers.of(NARROW, seed=SEED + 1)
    )


def test_a_model_directory_can_load_them_again(tmp_path: Path) -> None:
    source = WeightSource(random_config=NARROW, seed=SEED, random_kind="outliers")
    manifest = export_model_directory(source, tmp_path / "m")
    assert manifest.source["random_kind"] == "outliers"
    plain = WeightSource(random_config=NARROW, seed=SEED).load(torch.float32)
    assert manifest.source["sha256"] != plain.source["sha256"]
    assert WeightSource.from_manifest(Manifest.read(tmp_path / "m").source, NARROW) == source
    result = check_parity(tmp_path / "m", samples=samples_from_grids(NARROW, CHECK_GRIDS))
    assert result.passed
    assert np.isfinite([row.metrics.relative_l2 for row in result.rows]).all()
