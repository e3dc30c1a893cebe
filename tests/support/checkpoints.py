"""Small checkpoint folders in every layout of names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmvision_export.benchmark.peers import as_nemo, as_transformers
from mmvision_export.models.random_weights import random_state_dict
from tests.support.configs import HEAD_DIM_80

State = dict[str, torch.Tensor]


STATE = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.bfloat16)


FC1 = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"


LAYOUTS: dict[str, Callable[[State], State]] = {
    "released": lambda s: {
        k: v.reshape(-1, 3, 2, 14, 14) if "patch_embedding" in k else v for k, v in s.items()
    },
    "transformers": lambda s: {
        f"model.{name}": tensor for name, tensor in as_transformers(s, HEAD_DIM_80).items()
    },
    "nemo": lambda s: {
        f"vision_tower.{name}": tensor for name, tensor in as_nemo(s, HEAD_DIM_80).items()
    },
    "nemo module": lambda s: as_nemo(s, HEAD_DIM_80),
    "nemo in a model": lambda s: {
        f"model.vision_tower.{name}": tensor for name, tensor in as_nemo(s, HEAD_DIM_80).items()
    },
}


def write_config(folder: Path) -> None:
    vision = {
        name: getattr(HEAD_DIM_80, name)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    }
    config = {
        "vision_config": vision,
        "text_config": {"hidden_size": HEAD_DIM_80.text_hidden_size},
        "projector_hidden_size": HEAD_DIM_80.projector_hidden_size,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path, tensors: State) -> Path:
    """A checkpoint in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def write_sharded(folder: Path, tensors: State) -> Path:
    """As the released one is.

    The vision tensors in two of five shards, of which the other three are not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    names = sorted(tensors)
    half = len(names) // 2
    shards = {
        "model-00002-of-00005.safetensors": names[:half],
        "model-00005-of-00005.safetensors": names[half:],
    }
    weight_map = {
        f"language_model.layers.{i}.weight": f"model-0000{i}-of-00005.safetensors"
        for i in (1, 3, 4)
    }
    for shard, contents in shards.items():
        # A language-model tensor that must not be read lies in the same shard: one of a type no
        # reader can convert.
        other = {f"language_model.{shard}": torch.zeros(3, dtype=torch.int64)}
        save_file(
            {**{name: tensors[name].contiguous() for name in contents}, **other}, folder / shard
        )
        weight_map |= dict.fromkeys([*contents, *other], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
