"""Both spellings of `config.json`, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.core.errors import ConfigError, Reason
from mmvision_export.models.minimax_m3_vl.config import (
    EncoderConfig,
    assumed_fields,
    config_from_dict,
    config_from_file,
)
from tests.support.errors import refused

RELEASED: dict[str, Any] = {
    "model_type": "minimax_m3_vl",
    "projector_hidden_size": 6144,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "patch_merge_bias": True,
    "text_config": {"hidden_size": 6144},
    "vision_config": {
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "intermediate_size": 5120,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "vision_segment_max_frames": 4,
        "img_token_compression_config": {
            "image_token_compression_method": "patch_merge",
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}

TRANSFORMERS: dict[str, Any] = {
    "projector_hidden_size": 6144,
    "text_config": {"hidden_size": 6144},
    "vision_config": {
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "intermediate_size": 5120,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    },
}


@pytest.mark.parametrize(
    "config", [RELEASED, TRANSFORMERS, {"vision_config": {}}], ids=["released", "hf", "defaults"]
)
def test_spellings_give_the_released_dimensions(config: dict[str, Any]) -> None:
    assert config_from_dict(config) == EncoderConfig()


def test_spelling_of_transformers_itself() -> None:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig

    saved = json.loads(MiniMaxM3VLConfig(vision_config={"hidden_size": 640}).to_json_string())
    assert config_from_dict(saved) == EncoderConfig(hidden_size=640)


@pytest.mark.parametrize("spelling", [RELEASED, TRANSFORMERS], ids=["released", "transformers"])
def test_every_value_is_read(spelling: dict[str, Any]) -> None:
    config = copy.deepcopy(spelling)
    vision = config["vision_config"]
    vision.update(hidden_size=96, num_attention_heads=2, num_hidden_layers=3, intermediate_size=7)
    vision.update(patch_size=8, num_channels=1, layer_norm_eps=1e-6)
    sizes, rope = (
        vision.get("img_token_compression_config", vision),
        vision.get("rope_parameters", vision),
    )
    sizes.update(spatial_merge_size=3, temporal_patch_size=1)
    rope["rope_theta"] = 5000
    config["text_config"]["hidden_size"] = 11
    config["projector_hidden_size"] = 13
    assert config_from_dict(config) == EncoderConfig(
        hidden_size=96,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=7,
        patch_size=8,
        num_channels=1,
        layer_norm_eps=1e-6,
        spatial_merge_size=3,
        temporal_patch_size=1,
        rope_theta=5000,
        text_hidden_size=11,
        projector_hidden_size=13,
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "vision_config.hidden_act",
            "quick_gelu",
            "vision_config.hidden_act: only 'gelu' is implemented, got 'quick_gelu'",
        ),
        ("vision_config.rope_mode", "2d", "vision_config.rope_mode: only '3d'"),
        (
            "vision_config.position_embedding_type",
            "learned",
            "position_embedding_type: only 'rope'",
        ),
        (
            "vision_config.rope_parameters",
            {"rope_type": "yarn"},
            "rope_type: only 'axial' is implemented, got 'yarn'",
        ),
        ("projector_hidden_act", "relu", "projector_hidden_act: only 'gelu'"),
        ("vision_feature_layer", -2, "vision_feature_layer: only -1"),
        (
            "vision_config.img_token_compression_config.image_token_compression_method",
            "pool",
            "only 'patch_merge'",
        ),
        (
            "vision_config.hidden_size",
            1281,
            "hidden_size must be a multiple of num_attention_heads",
        ),
        ("vision_config.hidden_size", "1280", "hidden_size must be a positive int, got '1280'"),
        ("vision_config.hidden_size", True, "hidden_size must be a positive int, got True"),
        ("vision_config.num_hidden_layers", 0, "num_hidden_layers must be a positive int, got 0"),
        ("vision_config.layer_norm_eps", float("nan"), "layer_norm_eps must be a positive float"),
        (
            "vision_config.head_dim",
            64,
            "head_dim must be hidden_size / num_attention_heads = 80, got 64",
        ),
        (
            "vision_config.spatial_merge_size",
            4,
            "vision_config gives spatial_merge_size twice, as 4 and 2",
        ),
        ("vision_config", None, "vision_config is missing"),
        ("vision_config", [], "vision_config must be an object, got list"),
        ("multimodal_projector_bias", "yes", "projector_bias must be true or false"),
    ],
)
def test_refusals_name_the_field(path: str, value: Any, message: str) -> None:
    config = copy.deepcopy(RELEASED)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(ConfigError) as caught:
        config_from_dict(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fact", "reason"),
    [
        ("{", "config.json", "unreadable"),
        ("[1]", "list", None),
        (None, "config.json", "missing"),
    ],
)
def test_unreadable_files(
    content: str | None, fact: str, reason: Reason | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with refused(ConfigError, tmp_path / "config.json", fact, reason=reason):
        config_from_file(tmp_path / "config.json")


def test_manifest_form_round_trips() -> None:
    config = EncoderConfig(num_hidden_layers=3)
    assert EncoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with refused(ConfigError, "depth"):
        EncoderConfig.from_json({"depth": 3})


def test_what_no_weight_shows_is_named_where_it_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for config, expected in (
        (RELEASED, set()),
        (
            {"vision_config": {}},
            {"num_attention_heads", "rope_theta", "layer_norm_eps", "segment_max_frames"},
        ),
        (
            {"vision_config": {"num_attention_heads": 16, "rope_theta": 10000.0}},
            {"layer_norm_eps", "segment_max_frames"},
        ),
    ):
        file.write_text(json.dumps(config))
        assumed = assumed_fields(file)
        assert set(assumed) == expected
        assert all(value == getattr(EncoderConfig(), name) for name, value in assumed.items())


@pytest.mark.parametrize("field", ["hidden_size", "spatial_merge_size", "rope_theta"])
def test_nan_is_refused(field: str) -> None:
    """Also of fields that several sections may give: NaN differs from itself."""
    with pytest.raises(ConfigError, match=f"{field} must be .*nan"):
        config_from_dict({"vision_config": {field: float("nan")}})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderConfig)])
def test_absurd_sizes_are_refused(field: str) -> None:
    if isinstance(getattr(EncoderConfig(), field), bool):
        return
    with refused(ConfigError, field):
        EncoderConfig.from_json({**EncoderConfig().to_json(), field: 10**13})
