"""Which family a `config.json` is of; what is of none is refused before weights are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmvision_export.core.errors import ConfigError
from mmvision_export.models import FAMILIES, family, family_from_file
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.weights import WeightSource
from tests.support.checkpoints import LAYOUTS, STATE, write_checkpoint
from tests.support.configs import HEAD_DIM_80


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "minimax_m3_vl"},
        {"architectures": ["MiniMaxM3SparseForConditionalGeneration"]},
        {"model_type": "renamed", "vision_config": {"img_token_compression_config": {}}},
        {"vision_config": {}},
    ],
    ids=["model_type", "architectures", "released spelling", "nothing named"],
)
def test_recognised(config: dict[str, Any]) -> None:
    assert family(config).name == "minimax_m3_vl"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "qwen2_vl", "vision_config": {"hidden_size": 1280}},
        {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
        {"model_type": ["minimax_m3_vl"], "architectures": 3, "vision_config": 1},
    ],
    ids=["empty", "another type", "another architecture", "malformed"],
)
def test_an_unknown_family_is_refused_with_what_is_supported(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        family(config)
    assert repr(config.get("model_type")) in str(refused.value)
    assert repr(config.get("architectures")) in str(refused.value)
    assert all(known.name in str(refused.value.hint) for known in FAMILIES)


def test_loading_refuses_an_unknown_family_by_its_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LAYOUTS["released"](STATE))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2_vl"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()  # would be the next error
    with pytest.raises(ConfigError) as refused:
        WeightSource(checkpoint=str(folder)).load(torch.float32)
    assert all(fact in str(refused.value) for fact in ("config.json", "qwen2_vl"))


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["missing", "no JSON", "no object"])
def test_unreadable_files(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        family_from_file(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(refused.value)


def test_a_family_gives_all_its_parts(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LAYOUTS["released"](STATE))
    found = family_from_file(folder / "config.json")
    config = found.config_from_file(folder / "config.json")
    assert config == HEAD_DIM_80
    checkpoint = found.checkpoint_from_folder(folder, dtype=torch.float32)
    encoder = found.encoder_from_state_dict(config, checkpoint.state_dict)
    assert isinstance(encoder, VisionEncoderModule)
    assert found.vision_shards({next(iter(STATE)): "a", "language_model.x": "b"}) == ["a"]
    assert found.preprocessor(config, None).patch_size == config.patch_size
    assert found.sample_grids()


def test_finding_a_family_loads_no_torch() -> None:
    code = (
        "import sys; from mmvision_export.models import family;"
        "family({'model_type': 'minimax_m3_vl'});"
        "sys.exit(bool({'torch', 'safetensors', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_m31_checkpoint_is_taken_if_its_tower_is_the_same(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LAYOUTS["released"](STATE))
    config = json.loads((folder / "config.json").read_text())
    named = {"model_type": "minimax_m3_vl", "architectures": ["MiniMaxM31ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | named))
    sizes = {"size": {"height": 1008, "width": 672}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    loaded = WeightSource(checkpoint=str(folder)).load(torch.float32)
    found = family_from_file(folder / "config.json").preprocessor(
        loaded.encoder.config, loaded.preprocessor, resize="box"
    )
    assert (found.resize, found.max_size) == ("box", (1008, 672))
    # Another tower is refused by what differs.
    config["vision_config"]["hidden_act"] = "silu"
    (folder / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(ConfigError, match="hidden_act"):
        WeightSource(checkpoint=str(folder)).load(torch.float32)
