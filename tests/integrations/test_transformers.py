"""transformers' whole model, tiny, with its vision tower replaced.

The same features and the same generated tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmvision_export import VisionEncoder
from mmvision_export.benchmark.peers import as_transformers
from mmvision_export.core.errors import InputError
from mmvision_export.integrations.transformers import replace_vision_tower
from tests.support.configs import HEAD_DIM_80, batch, relative_l2
from tests.support.errors import refused
from tests.support.peers import weights

IMAGE, VIDEO = 5, 6


@pytest.fixture(scope="module")
def runtime(exported: Path) -> Iterator[VisionEncoder]:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        yield encoder


@pytest.fixture
def model() -> Any:
    """A tiny MiniMax-M3-VL with the vision weights of the exported encoder."""
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig

    if (
        "cu_seqlens"
        not in inspect.signature(modeling.MiniMaxM3VLVisionAttention.forward).parameters
    ):
        pytest.skip("transformers before 5.23 lets the images of a batch attend to each other")
    vision: Any = {
        name: getattr(HEAD_DIM_80, name)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    }
    text: Any = {
        "vocab_size": 64,
        "hidden_size": HEAD_DIM_80.text_hidden_size,
        "intermediate_size": 64,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = MiniMaxM3VLConfig(
        vision_config=vision,
        text_config=text,
        projector_hidden_size=HEAD_DIM_80.projector_hidden_size,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    torch.manual_seed(0)
    whole: Any = modeling.MiniMaxM3SparseForConditionalGeneration(config)
    whole.eval()
    # Embeddings large enough that what is seen decides what is said.
    for parameter in whole.model.language_model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    missing, unexpected = whole.model.load_state_dict(
        as_transformers(weights("80"), HEAD_DIM_80), strict=False
    )
    assert not unexpected
    assert all(name.startswith("language_model.") for name in missing)
    return whole


def inputs(kind: str, seed: int) -> dict[str, Any]:
    grid = [(1, 4, 6), (1, 2, 8)] if kind == "image" else [(4, 4, 4), (2, 4, 4)]
    pixels, rows = batch(grid, HEAD_DIM_80, seed)
    token = IMAGE if kind == "image" else VIDEO
    ids = [1, 10, *[token] * (len(pixels) // 4), 11, 12]
    values = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {
        "input_ids": torch.tensor([ids]),
        values: torch.from_numpy(pixels),
        f"{kind}_grid_thw": torch.from_numpy(rows),
    }


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_same_features_and_tokens(model: Any, runtime: VisionEncoder, kind: str) -> None:
    def generated(seed: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(**inputs(kind, seed), max_new_tokens=12, do_sample=False)
        return list(out[0].tolist())

    def features() -> tuple[torch.Tensor, ...]:
        given = inputs(kind, 0)
        del given["input_ids"]
        with torch.inference_mode():
            out = getattr(model, f"get_{kind}_features")(*given.values())
        return tuple(out.pooler_output)

    before, tokens = features(), [generated(seed) for seed in range(3)]
    # Control: what is seen decides what is said, so that equal tokens mean something.
    assert len({tuple(each) for each in tokens}) > 1
    tower, projector = replace_vision_tower(model, runtime)
    after = features()
    assert [(f.shape, f.dtype) for f in after] == [(f.shape, f.dtype) for f in before]
    assert all(relative_l2(a, b) <= 2e-6 for a, b in zip(after, before, strict=True))
    assert [generated(seed) for seed in range(3)] == tokens
    model.model.vision_tower, model.model.multi_modal_projector = tower, projector
    assert all(torch.equal(a, b) for a, b in zip(features(), before, strict=True))


def test_the_features_do_come_from_the_encoder(model: Any, runtime: VisionEncoder) -> None:
    replace_vision_tower(model, runtime)
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == 0
    given = inputs("image", 0)
    out = model.get_image_features(given["pixel_values"], given["image_grid_thw"])
    expected = runtime(given["pixel_values"], given["image_grid_thw"])
    assert torch.equal(torch.cat(tuple(out.pooler_output)), expected)


def test_other_models_are_refused(model: Any, runtime: VisionEncoder) -> None:
    with refused(InputError, "Linear", "vision_tower"):
        replace_vision_tower(nn.Linear(2, 2), runtime)
    model.model.config.text_config.hidden_size = 97
    with refused(InputError, "hidden_size", 97, 96):
        replace_vision_tower(model, runtime)


def test_a_second_call_replaces_the_encoder(model: Any, runtime: VisionEncoder) -> None:
    first = replace_vision_tower(model, runtime)
    second: Any = replace_vision_tower(model, runtime)
    assert second[0].encoder is runtime
    assert model.model.vision_tower.dtype == next(first[1].parameters()).dtype


def test_a_copy_runs_the_same_encoder(model: Any, runtime: VisionEncoder) -> None:
    replace_vision_tower(model, runtime)
    given = {name: value for name, value in inputs("image", 0).items() if name != "input_ids"}
    with torch.inference_mode():
        expected = model.get_image_features(**given).pooler_output
        copied = copy.deepcopy(model).get_image_features(**given).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(copied, expected, strict=True))


def test_a_checkpoint_without_its_tower_is_not_written(
    model: Any, runtime: VisionEncoder, tmp_path: Path
) -> None:
    before = replace_vision_tower(model, runtime)
    with refused(InputError, "vision tower"):
        model.save_pretrained(tmp_path)
    model.model.vision_tower, model.model.multi_modal_projector = before
    model.save_pretrained(tmp_path)  # the control
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("vision_tower" in name for name in file.keys())  # noqa: SIM118
