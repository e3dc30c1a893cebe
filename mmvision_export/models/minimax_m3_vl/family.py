"""MiniMax-M3-VL as `models.family` finds it; each member imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mmvision_export.core.progress import Progress
    from mmvision_export.models.minimax_m3_vl.checkpoint import Checkpoint
    from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
    from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
    from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
    from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
    from mmvision_export.models.sample_batches import Grid

__all__ = ["MiniMaxM3VL"]

_MODEL_TYPE = "minimax_m3_vl"
_ARCHITECTURE_PREFIX = "MiniMaxM3"
# Of `vision_config`: the released spelling's section, which no other family has.
_COMPRESSION = "img_token_compression_config"


class MiniMaxM3VL:
    """The one family there is; see `mmvision_export.models.Family`."""

    name = _MODEL_TYPE

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By its `model_type` or `architectures`, or by its `vision_config`.

        A config that names neither and has a `vision_config` is taken for this family, as NeMo
        writes it: every field and every tensor's shape is checked afterwards.
        """
        model_type, architectures = config.get("model_type"), config.get("architectures")
        if model_type == _MODEL_TYPE:
            return True
        if isinstance(architectures, list) and any(
            str(architecture).startswith(_ARCHITECTURE_PREFIX) for architecture in architectures
        ):
            return True
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            return False
        return _COMPRESSION in vision or not (model_type or architectures)

    def config_from_file(self, path: Path) -> EncoderConfig:
        from mmvision_export.models.minimax_m3_vl.config import config_from_file

        return config_from_file(path)

    def encoder_from_state_dict(
        self, config: EncoderConfig, state_dict: Mapping[str, torch.Tensor]
    ) -> VisionEncoderModule:
        from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict

        return encoder_from_state_dict(config, state_dict)

    def checkpoint_from_folder(
        self, folder: Path, *, dtype: torch.dtype, progress: Progress | None = None
    ) -> Checkpoint:
        from mmvision_export.models.minimax_m3_vl.checkpoint import checkpoint_from_folder

        return checkpoint_from_folder(folder, dtype=dtype, progress=progress)

    def vision_shards(self, names_by_tensor: Mapping[str, str]) -> list[str]:
        from mmvision_export.models.minimax_m3_vl.checkpoint import vision_shards

        return vision_shards(names_by_tensor)

    def preprocessor(
        self,
        config: EncoderConfig,
        path: Path | None,
        *,
        resize: ResizeRule | None = None,
        max_long_side: int | None = None,
    ) -> PreprocessorConfig:
        from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig

        if path is None:
            result = PreprocessorConfig.for_encoder(config)
        else:
            result = PreprocessorConfig.read(path, config, resize=resize)
        return result.by(resize, max_long_side=max_long_side)

    def sample_grids(self) -> Mapping[str, Grid]:
        from mmvision_export.models.sample_batches import PARITY_GRIDS

        return PARITY_GRIDS
