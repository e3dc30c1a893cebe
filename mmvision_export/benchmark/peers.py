"""The encoder as others run it, on our weights.

Transformers, NeMo, and our own PyTorch modules, eager and compiled.

Each takes `pixel_values`, `grid_thw` as tensors and gives `image_embeds`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmvision_export.benchmark.sides import PEERS
from mmvision_export.core.errors import BackendError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule

__all__ = ["as_nemo", "as_transformers", "peer_from_encoder", "transformers_modules"]

Peer = Callable[[Tensor, Tensor], Tensor]


def peer_from_encoder(name: str, encoder: VisionEncoderModule) -> Peer:
    """A peer with the weights of an encoder, in their type.

    Args:
        name: One of `PEERS`, without its precision.
        encoder: The weights.

    Raises:
        BackendError: There is no such peer, or its package is not installed or too old.
    """
    if name.startswith("transformers-"):
        return _transformers(encoder, name.removeprefix("transformers-"))
    if name == "nemo":
        return _nemo(encoder)
    if name == "torch-eager":
        return encoder
    if name == "torch-compile":
        compiled: Peer = torch.compile(encoder, dynamic=True)
        return compiled
    raise BackendError(f"no such peer: {name}", hint=f"choose from: {', '.join(PEERS)}")


def as_transformers(state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Our names -> those of transformers' MiniMaxM3VLModel, without `model.`."""
    prefix = "vision_tower.vision_model."
    result = {}
    for name, tensor in state.items():
        new = name.replace(f"{prefix}encoder.", "vision_tower.").replace(prefix, "vision_tower.")
        new = new.replace("embeddings.patch_embedding", "embeddings.proj")
        new = new.replace("patch_merge_mlp.linear_", "multi_modal_projector.merge_linear_")
        result[new] = _convolution(tensor, config) if "embeddings.proj" in new else tensor
    return result


def as_nemo(state: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Our names -> those of NeMo's MiniMaxM3VisionModel."""
    return {
        name.removeprefix("vision_tower."): _convolution(tensor, config)
        if "patch_embedding" in name
        else tensor
        for name, tensor in state.items()
    }


def _convolution(tensor: Tensor, config: EncoderConfig) -> Tensor:
    """The patch embedding as the kernel of the convolution it is in the checkpoint."""
    side = config.patch_size
    return tensor.reshape(-1, config.num_channels, config.temporal_patch_size, side, side)


def _transformers(encoder: VisionEncoderModule, attention: str) -> Peer:
    tower, projector = transformers_modules(encoder, attention)

    def run(pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        hidden = tower(pixel_values.to(encoder.dtype), grid_thw).last_hidden_state
        result: Tensor = projector(hidden.squeeze(0))
        return result

    return run


def transformers_modules(
    encoder: VisionEncoderModule, attention: str
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The tower and projector of transformers with the weights of an encoder, not copied.

    Args:
        encoder: The weights, and their dimensions.
        attention: `eager` or `sdpa`.

    Raises:
        BackendError: transformers is not installed or too old.
    """
    try:
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
            MiniMaxM3VLMultiModalProjector,
            MiniMaxM3VLVisionModel,
        )
    except ImportError as error:
        raise BackendError(
            f"transformers has no MiniMax-M3-VL: {error}", hint="pip install 'transformers>=5.23'"
        ) from None

    config = encoder.config
    fields = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    settings = MiniMaxM3VLConfig(
        vision_config={name: getattr(config, name) for name in fields},
        text_config={"hidden_size": config.text_hidden_size, "num_hidden_layers": 1},
        projector_hidden_size=config.projector_hidden_size,
    )
    vision: Any = settings.vision_config
    vision._attn_implementation = attention
    with torch.device("meta"):
        tower, projector = MiniMaxM3VLVisionModel(vision), MiniMaxM3VLMultiModalProjector(settings)
    state = as_transformers(encoder.state_dict(), config)
    for module, part in ((tower, "vision_tower."), (projector, "multi_modal_projector.")):
        # Assigned, not copied: one copy of the weights in the process, as a user of transformers
        # has.
        weights = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
        module.load_state_dict(weights, strict=True, assign=True)
        _fill_buffers(
            module,
            MiniMaxM3VLVisionModel(vision) if module is tower and _has_meta(module) else None,
        )
        module.eval()
    return tower, projector


def _has_meta(module: torch.nn.Module) -> bool:
    return any(buffer.is_meta for buffer in module.buffers())


def _fill_buffers(module: torch.nn.Module, source: torch.nn.Module | None) -> None:
    """Give a module made on the meta device the buffers of one made on the CPU."""
    if source is None:
        return
    for name, buffer in source.named_buffers():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)


def _nemo(encoder: VisionEncoderModule) -> Peer:
    config = encoder.config
    fields = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    settings = SimpleNamespace(
        **{
            name: getattr(config, name)
            for name in (*fields, "patch_size", "num_channels", "layer_norm_eps", "rope_theta")
        },
        hidden_act="gelu",
        rope_mode="3d",
        attention_dropout=0.0,
        position_embedding_type="rope",
        vision_segment_max_frames=config.segment_max_frames,
        img_token_compression_config={
            "spatial_merge_size": config.spatial_merge_size,
            "temporal_patch_size": config.temporal_patch_size,
        },
    )
    model = _nemo_module().MiniMaxM3VisionModel(
        settings, config.text_hidden_size, config.projector_hidden_size
    )
    model.load_state_dict(as_nemo(encoder.state_dict(), config), strict=True, assign=True)
    model.eval()

    def run(pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        result: Tensor = model(pixel_values, grid_thw.tolist())
        return result

    return run


def _nemo_module() -> ModuleType:
    """NeMo's vision_encoder.py on its own: its package would import the whole training stack."""
    package = importlib.util.find_spec("nemo_automodel")
    if package is None or not package.submodule_search_locations:
        raise BackendError(
            "nemo-automodel is not installed", hint="pip install --no-deps nemo-automodel"
        )
    path = (
        Path(package.submodule_search_locations[0])
        / "components/models/minimax_m3_vl/vision_encoder.py"
    )
    spec = importlib.util.spec_from_file_location("nemo_vision_encoder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
