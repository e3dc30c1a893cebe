"""transformers' MiniMax-M3-VL with its vision tower and projector replaced by a `VisionEncoder`.

```python
model = AutoModelForImageTextToText.from_pretrained("MiniMaxAI/MiniMax-M3", ...)
with VisionEncoder.open("engines/MiniMax-M3") as encoder:
    replace_vision_tower(model, encoder)
    model.generate(**inputs)
```
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmvision_export.core.errors import InputError
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["replace_vision_tower"]


class EncoderTower(nn.Module):
    """Stands where the vision tower was.

    Gives image tokens, already projected and merged, for hidden states.
    """

    def __init__(self, encoder: VisionEncoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype
        self.register_state_dict_pre_hook(_refuse_saving)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderTower:
        """A copy of a model runs the same encoder."""
        return EncoderTower(self.encoder, self.dtype)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        device = pixel_values.device
        if device.type == "cuda":
            given: Any = pixel_values.to(getattr(torch, self.encoder.dtype.name)).contiguous()
            with torch.cuda.device(device):
                tokens = self.encoder(given, grid_thw, stream=torch.cuda.current_stream(device))
        else:
            tokens = self.encoder(pixel_values.float(), grid_thw)
        # [tokens, text_hidden] -> [1, tokens, text_hidden], as the tower gives its patches
        hidden = tokens.to(device=device, dtype=self.dtype).unsqueeze(0)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A checkpoint would have no vision tower, and nobody would be told."""
    raise InputError(
        "the model's vision tower is a VisionEncoder, whose weights the model cannot save",
        hint="put back the tower and projector that replace_vision_tower returned, save, and replace them again",
    )


class Merged(nn.Module):
    """Stands where the projector was: what it is given is projected and merged."""

    def __init__(self, spatial_merge_size: int) -> None:
        super().__init__()
        self.spatial_merge_size = spatial_merge_size

    def forward(self, image_features: Tensor) -> Tensor:
        return image_features


def replace_vision_tower(model: nn.Module, encoder: VisionEncoder) -> tuple[nn.Module, nn.Module]:
    """Let a loaded model take its image and video features from an encoder.

    `get_image_features` and `get_video_features` then give `pooler_output` as before: the same
    shapes and dtype. Their `last_hidden_state` also holds the image tokens, `[1, tokens,
    text_hidden_size]`, because the tower's own hidden states stay inside the encoder.

    A second call replaces the encoder. A copy of the model runs the same encoder. `save_pretrained`
    and `state_dict` are refused until the tower is put back.

    Args:
        model: A `MiniMaxM3VLModel`, or a model whose `model` is one. It is changed in place.
        encoder: An encoder of the same checkpoint; it stays open for as long as the model is used.

    Returns:
        The tower and the projector that were replaced. Drop them to free their memory, or assign them
        back. A second call returns the stand-ins of the first call.

    Raises:
        InputError: The model is of another family, or its dimensions differ from the encoder's.
    """
    inner: Any = getattr(model, "model", model)
    if not (hasattr(inner, "vision_tower") and hasattr(inner, "multi_modal_projector")):
        raise InputError(
            f"a {type(model).__name__} has no vision_tower and multi_modal_projector to replace"
        )
    settings, config = inner.config, encoder.config
    for name, theirs, ours in (
        ("text hidden_size", settings.text_config.hidden_size, config.text_hidden_size),
        ("patch_size", settings.vision_config.patch_size, config.patch_size),
        (
            "spatial_merge_size",
            inner.multi_modal_projector.spatial_merge_size,
            config.spatial_merge_size,
        ),
        ("vision hidden_size", settings.vision_config.hidden_size, config.hidden_size),
        ("num_hidden_layers", settings.vision_config.num_hidden_layers, config.num_hidden_layers),
    ):
        if theirs != ours:
            raise InputError(f"the model's {name} is {theirs}, the encoder's is {ours}")
    before = inner.vision_tower, inner.multi_modal_projector
    tower = before[0]
    is_replaced = isinstance(tower, EncoderTower)
    dtype = tower.dtype if is_replaced else next(before[1].parameters()).dtype
    inner.vision_tower = EncoderTower(encoder, dtype)
    inner.multi_modal_projector = Merged(config.spatial_merge_size)
    return before
