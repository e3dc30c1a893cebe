"""Loading: three layouts, sharded or not, and every way a checkpoint can be wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmvision_export.core.errors import CheckpointError, Reason
from mmvision_export.models.minimax_m3_vl.checkpoint import (
    checkpoint_from_folder,
    encoder_from_state_dict,
    released_name,
)
from tests.support.checkpoints import (
    FC1,
    LAYOUTS,
    STATE,
    State,
    write_checkpoint,
    write_config,
    write_sharded,
)
from tests.support.configs import HEAD_DIM_80
from tests.support.errors import refused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_checkpoint, write_sharded], ids=["one file", "sharded"])
def test_layouts(layout: str, write: Callable[[Path, State], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", LAYOUTS[layout](STATE))
    loaded = checkpoint_from_folder(folder, dtype=torch.float32)
    assert loaded.config == HEAD_DIM_80
    assert loaded.state_dict.keys() == STATE.keys()
    for name, tensor in loaded.state_dict.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, STATE[name].float())
    encoder_from_state_dict(loaded.config, loaded.state_dict)


def test_only_shards_with_vision_tensors_are_opened(tmp_path: Path) -> None:
    loaded = checkpoint_from_folder(
        write_sharded(tmp_path, LAYOUTS["released"](STATE)), dtype=torch.float32
    )
    assert loaded.shards == ["model-00002-of-00005.safetensors", "model-00005-of-00005.safetensors"]


def test_transformers_own_state_dict(tmp_path: Path) -> None:
    """The names that transformers itself saves, of a whole tiny model, language model included."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
        MiniMaxM3SparseForConditionalGeneration,
    )

    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(MiniMaxM3VLConfig())
    vision = [name for name, _ in model.named_parameters() if released_name(name) is not None]
    language = [name for name, _ in model.named_parameters() if released_name(name) is None]
    assert len(vision) == 1 + 2 + 32 * 16 + 8
    assert all("language_model" in name or "lm_head" in name for name in language)
    assert language


def test_hash_identifies_the_tensors(tmp_path: Path) -> None:
    first = checkpoint_from_folder(
        write_checkpoint(tmp_path / "a", LAYOUTS["released"](STATE)), dtype=torch.float32
    )
    sharded = checkpoint_from_folder(
        write_sharded(tmp_path / "b", LAYOUTS["released"](STATE)), dtype=torch.float16
    )
    changed = {**STATE, FC1: STATE[FC1] * 2}
    other = checkpoint_from_folder(
        write_checkpoint(tmp_path / "c", LAYOUTS["released"](changed)), dtype=torch.float32
    )
    assert first.sha256 == sharded.sha256 != other.sha256


def test_everything_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = LAYOUTS["released"](STATE)
    del tensors["multi_modal_projector.linear_1.bias"]
    tensors["vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias"] = torch.zeros(3)
    tensors["vision_tower.vision_model.pre_layrnorm.bias"] = torch.zeros(3)
    tensors["patch_merge_mlp.linear_1.bias"] = torch.zeros(112, dtype=torch.int32)
    tensors[FC1] = tensors[FC1].clone()
    tensors[FC1][0, 0] = float("nan")
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_from_folder(folder, dtype=torch.float32)
    message = str(caught.value)
    assert "missing: multi_modal_projector.linear_1.bias" in message
    assert "unexpected: vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias" in message
    assert "vision_tower.vision_model.pre_layrnorm.bias: expected [160], got [3]" in message
    assert (
        "patch_merge_mlp.linear_1.bias: expected bfloat16, float16 or float32, got torch.int32"
        in message
    )
    assert f"not-finite: {FC1}" in message


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = {
        **LAYOUTS["released"](STATE),
        "vision_tower.multi_modal_projector.linear_1.bias": torch.zeros(112),
    }
    with refused(CheckpointError, "unexpected", "vision_tower.multi_modal_projector.linear_1.bias"):
        checkpoint_from_folder(write_checkpoint(tmp_path, tensors), dtype=torch.float32)


@pytest.mark.parametrize("shape", [(160, 14, 14, 3, 2), (160, 2, 3, 14, 14), (1176, 160)])
def test_a_permuted_patch_kernel(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As many values in another order would load, and compute something else."""
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    tensors = {**STATE, name: STATE[name].reshape(shape)}
    with refused(CheckpointError, name, "[160, 3, 2, 14, 14]", list(shape)):
        checkpoint_from_folder(write_checkpoint(tmp_path, tensors), dtype=torch.float32)


def test_weights_beyond_float16(tmp_path: Path) -> None:
    tensors = LAYOUTS["released"]({**STATE, FC1: STATE[FC1] * 1e6})
    folder = write_checkpoint(tmp_path, tensors)
    checkpoint_from_folder(folder, dtype=torch.bfloat16)
    with refused(CheckpointError, torch.float16, FC1) as caught:
        checkpoint_from_folder(folder, dtype=torch.float16)
    assert "--bf16" in str(caught.value.hint)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, LAYOUTS["released"](STATE))
    (folder / "model-00005-of-00005.safetensors").unlink()
    with refused(CheckpointError, folder / "model-00005-of-00005.safetensors", reason="missing"):
        checkpoint_from_folder(folder, dtype=torch.float32)


def test_truncated_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, LAYOUTS["released"](STATE)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with refused(CheckpointError, tmp_path / "model.safetensors", reason="unreadable"):
        checkpoint_from_folder(tmp_path, dtype=torch.float32)


def test_pickles_are_refused_without_being_opened(tmp_path: Path) -> None:
    write_config(tmp_path)

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with refused(CheckpointError, "pytorch_model.bin", reason="unsafe"):
        checkpoint_from_folder(tmp_path, dtype=torch.float32)
    # The same bytes under the name of the safe format.
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with refused(CheckpointError, tmp_path / "model.safetensors", reason="unreadable"):
        checkpoint_from_folder(tmp_path, dtype=torch.float32)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("index", "fact", "reason"),
    [
        ("{", "JSON", "unreadable"),
        ('{"weight_map": [1]}', "AttributeError", "malformed"),
        ('{"weight_map": {"vision_tower.x": 3}}', "string", "malformed"),
        (
            '{"weight_map": {"vision_tower.x": "../secret.safetensors"}}',
            "'../secret.safetensors'",
            "unsafe",
        ),
        (
            '{"weight_map": {"vision_tower.x": "pytorch_model.bin"}}',
            "'pytorch_model.bin'",
            "unsafe",
        ),
        ('{"weight_map": {"lm_head.weight": "a.safetensors"}}', "vision tensors", None),
    ],
)
def test_bad_index(index: str, fact: str, reason: Reason | None, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with refused(CheckpointError, tmp_path / "model.safetensors.index.json", fact, reason=reason):
        checkpoint_from_folder(tmp_path, dtype=torch.float32)


def test_no_such_folder_and_no_weights(tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / "nowhere", reason="missing"):
        checkpoint_from_folder(tmp_path / "nowhere", dtype=torch.float32)
    write_config(tmp_path)
    with refused(
        CheckpointError,
        tmp_path,
        "model.safetensors",
        "model.safetensors.index.json",
        reason="missing",
    ):
        checkpoint_from_folder(tmp_path, dtype=torch.float32)


def test_peak_memory_is_near_the_size_of_the_result(tmp_path: Path) -> None:
    """Loading 400 MB of bfloat16 to 800 MB of float32 must not hold a second copy of either."""
    program = f"""
import resource, sys, torch, dataclasses
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.benchmark.peers import as_nemo, as_transformers
from mmvision_export.models.minimax_m3_vl.checkpoint import checkpoint_from_folder
from mmvision_export.models.random_weights import random_state_dict
from safetensors.torch import save_file
import json
folder = Path({str(tmp_path)!r})
wide = dict(hidden_size=1280, num_attention_heads=16, num_hidden_layers=8, intermediate_size=5120)
config = EncoderConfig(**wide, text_hidden_size=1024, projector_hidden_size=4096)
if sys.argv[1] == "write":
    save_file(random_state_dict(config, seed=0, dtype=torch.bfloat16), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(
        {{"vision_config": wide, "text_config": {{"hidden_size": 1024}}, "projector_hidden_size": 4096}}))
else:
    def megabytes(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(l for l in lines if l.startswith(field)).split()[1]) / 1024
    before = megabytes("VmRSS")
    state = checkpoint_from_folder(folder, dtype=torch.float32).state_dict
    size = sum(t.nbytes for t in state.values()) / 2**20
    print(size, megabytes("VmHWM") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", program, "write"], check=True)
    out = subprocess.run(
        [sys.executable, "-c", program, "read"], check=True, capture_output=True, text=True
    ).stdout
    size, peak = (float(part) for part in out.split())
    print(f"{size:.0f} MB of weights, {peak:.0f} MB of peak memory")
    assert size > 500
    # The file's own pages count while they are mapped: half the result, in bfloat16.
    assert peak < 1.5 * size + 50
