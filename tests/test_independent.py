"""Against implementations written by others, on the same weights: transformers (eager and SDPA) and NeMo AutoModel.

They stand outside the ladder. PyTorch and the exported graph must both match them in float32.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.backends.onnxruntime import create_session
from mmvision_export.checkpoint import encoder_from_state_dict
from mmvision_export.config import EncoderConfig
from mmvision_export.onnx_export import onnx_from_encoder
from mmvision_export.random_weights import random_state_dict
from tests.configs import GRIDS, HEAD_DIM_64, HEAD_DIM_80, batch, relative_l2

CONFIGS = {"80": HEAD_DIM_80, "64": HEAD_DIM_64}
State = dict[str, torch.Tensor]


@functools.cache
def weights(head_dim: str) -> State:
    return random_state_dict(CONFIGS[head_dim], seed=1, dtype=torch.float32)


def as_transformers(state: State) -> State:
    """Our names -> transformers' MiniMaxM3VLModel's, without `model.`."""
    tower = "vision_tower.vision_model."
    result = {}
    for name, tensor in state.items():
        new = name.replace(f"{tower}encoder.", "vision_tower.").replace(tower, "vision_tower.")
        new = new.replace("embeddings.patch_embedding", "embeddings.proj")
        new = new.replace("patch_merge_mlp.linear_", "multi_modal_projector.merge_linear_")
        result[new] = tensor.reshape(-1, 3, 2, 14, 14) if "embeddings.proj" in new else tensor
    return result


def as_nemo(state: State) -> State:
    """Our names -> NeMo's MiniMaxM3VisionModel's."""
    return {
        name.removeprefix("vision_tower."): tensor.reshape(-1, 3, 2, 14, 14) if "patch_embedding" in name else tensor
        for name, tensor in state.items()
    }


def run_transformers(config: EncoderConfig, state: State, attention: str, pixels: np.ndarray, grid: np.ndarray) -> Any:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
        MiniMaxM3VLMultiModalProjector,
        MiniMaxM3VLVisionAttention,
        MiniMaxM3VLVisionModel,
    )

    settings = MiniMaxM3VLConfig(
        vision_config={
            name: getattr(config, name)
            for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        },
        text_config={"hidden_size": config.text_hidden_size, "num_hidden_layers": 1},
        projector_hidden_size=config.projector_hidden_size,
    )
    if len(grid) > 1 and "cu_seqlens" not in inspect.signature(MiniMaxM3VLVisionAttention.forward).parameters:
        pytest.skip("transformers before 5.23 lets the images of a batch attend to each other")
    vision: Any = settings.vision_config
    vision._attn_implementation = attention
    tower, projector = MiniMaxM3VLVisionModel(vision), MiniMaxM3VLMultiModalProjector(settings)
    for module, prefix in ((tower, "vision_tower."), (projector, "multi_modal_projector.")):
        part = {k.removeprefix(prefix): v for k, v in as_transformers(state).items() if k.startswith(prefix)}
        module.load_state_dict(part, strict=True)
        module.eval()
    with torch.inference_mode():
        hidden = tower(torch.from_numpy(pixels), torch.from_numpy(grid)).last_hidden_state.squeeze(0)
        return projector(hidden).numpy()


@functools.cache
def nemo_module() -> ModuleType:
    """NeMo's vision_encoder.py on its own: its package would import the whole training stack."""
    package = importlib.util.find_spec("nemo_automodel")
    if package is None or not package.submodule_search_locations:
        pytest.skip("nemo-automodel is not installed (pip install --no-deps nemo-automodel)")
    path = Path(package.submodule_search_locations[0]) / "components/models/minimax_m3_vl/vision_encoder.py"
    spec = importlib.util.spec_from_file_location("nemo_vision_encoder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_nemo(config: EncoderConfig, state: State, pixels: np.ndarray, grid: np.ndarray) -> Any:
    from types import SimpleNamespace

    settings = SimpleNamespace(
        **{
            n: getattr(config, n)
            for n in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        },
        patch_size=14,
        num_channels=3,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_mode="3d",
        attention_dropout=0.0,
        position_embedding_type="rope",
        vision_segment_max_frames=4,
        img_token_compression_config={"spatial_merge_size": 2, "temporal_patch_size": 2},
    )
    model = nemo_module().MiniMaxM3VisionModel(settings, config.text_hidden_size, config.projector_hidden_size)
    model.load_state_dict(as_nemo(state), strict=True)
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(pixels), grid.tolist()).numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def head_dim(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(head_dim: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    ir.save(onnx_from_encoder(encoder_from_state_dict(CONFIGS[head_dim], weights(head_dim))), path)
    return create_session(path, provider="CPUExecutionProvider")


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("peer", ["transformers-eager", "transformers-sdpa", "nemo"])
def test_pytorch_and_onnx_match(peer: str, grid: list[tuple[int, int, int]], head_dim: str, session: Any) -> None:
    config, state = CONFIGS[head_dim], weights(head_dim)
    pixels, rows = batch(grid, config)
    if peer == "nemo":
        expected = run_nemo(config, state, pixels, rows)
    else:
        expected = run_transformers(config, state, peer.removeprefix("transformers-"), pixels, rows)
    with torch.inference_mode():
        ours = encoder_from_state_dict(config, state)(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
    (graph,) = session.run(None, {"pixel_values": pixels, "grid_thw": rows})
    assert relative_l2(ours, expected) <= 1e-5
    assert relative_l2(graph, expected) <= 1e-5


def test_the_comparison_can_fail() -> None:
    """What transformers' own exporter does to two images of different size: attention across a wrong boundary."""
    config, state = HEAD_DIM_80, weights("80")
    pixels, rows = batch(GRIDS["two of different size"], config)
    expected = run_transformers(config, state, "sdpa", pixels, rows)
    frozen = np.array([[1, 10, 2], [1, 10, 2]])  # as many patches, as if both images were alike
    with torch.inference_mode():
        wrong = encoder_from_state_dict(config, state)(torch.from_numpy(pixels), torch.from_numpy(frozen)).numpy()
    assert relative_l2(wrong, expected) > 1e-3
