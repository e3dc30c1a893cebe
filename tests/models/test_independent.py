"""Against implementations written by others, on the same weights.

Transformers (eager and SDPA) and NeMo AutoModel.

They stand outside the ladder. PyTorch and the exported graph must both match them in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.export.onnx_export import onnx_from_encoder
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.runtime.backends.onnxruntime import create_session
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, relative_l2
from tests.support.peers import CONFIGS, run_peer, weights


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
def test_pytorch_and_onnx_match(
    peer: str, grid: list[tuple[int, int, int]], head_dim: str, session: Any
) -> None:
    config, state = CONFIGS[head_dim], weights(head_dim)
    pixels, rows = batch(grid, config)
    expected = run_peer(peer, config, state, pixels, rows)
    with torch.inference_mode():
        ours = encoder_from_state_dict(config, state)(
            torch.from_numpy(pixels), torch.from_numpy(rows)
        ).numpy()
    (graph,) = session.run(None, {"pixel_values": pixels, "grid_thw": rows})
    assert relative_l2(ours, expected) <= 1e-5
    assert relative_l2(graph, expected) <= 1e-5


def test_the_comparison_can_fail() -> None:
    """What transformers' own exporter does to two images: attention across a wrong boundary."""
    config, state = HEAD_DIM_80, weights("80")
    pixels, rows = batch(GRIDS["two of different size"], config)
    expected = run_peer("transformers-sdpa", config, state, pixels, rows)
    frozen = np.array([[1, 10, 2], [1, 10, 2]])  # as many patches, as if both images were alike
    with torch.inference_mode():
        wrong = encoder_from_state_dict(config, state)(
            torch.from_numpy(pixels), torch.from_numpy(frozen)
        ).numpy()
    assert relative_l2(wrong, expected) > 1e-3
