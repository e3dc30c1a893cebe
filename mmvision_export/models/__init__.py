"""Encoders in PyTorch, where their weights come from, and how images become their patches.

A model family is a folder here, and one row of `FAMILIES`. What depends on the family asks `family`
for it, and imports no family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmvision_export.core.errors import ConfigError, ManifestError
from mmvision_export.core.files import read_json
from mmvision_export.models.minimax_m3_vl.family import MiniMaxM3VL

if TYPE_CHECKING:
    import torch

    from mmvision_export.core.progress import Progress
    from mmvision_export.models.minimax_m3_vl.checkpoint import Checkpoint
    from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
    from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
    from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
    from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
    from mmvision_export.models.sample_batches import Grid

__all__ = ["FAMILIES", "Family", "family", "family_from_file"]


class Family(Protocol):
    """What one model family gives. Each member loads what it needs when it is called.

    Its types are those of the only family there is. A second family makes them protocols too.
    """

    @property
    def name(self) -> str:
        """Of its folder, which is its `model_type`."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a parsed `config.json` is of this family."""

    def config_from_file(self, path: Path) -> EncoderConfig:
        """The encoder's dimensions from `config.json`."""

    def encoder_from_state_dict(
        self, config: EncoderConfig, state_dict: Mapping[str, torch.Tensor]
    ) -> VisionEncoderModule:
        """The encoder in PyTorch, in evaluation mode, with the given tensors themselves."""

    def checkpoint_from_folder(
        self, folder: Path, *, dtype: torch.dtype, progress: Progress | None = None
    ) -> Checkpoint:
        """The encoder's weights, and no others, from a checkpoint's folder."""

    def vision_shards(self, names_by_tensor: Mapping[str, str]) -> list[str]:
        """Which of an index's files hold them."""

    def preprocessor(
        self,
        config: EncoderConfig,
        path: Path | None,
        *,
        resize: ResizeRule | None = None,
        max_long_side: int | None = None,
    ) -> PreprocessorConfig:
        """How images become patches: as a checkpoint's file says, or as released without one."""

    def sample_grids(self) -> Mapping[str, Grid]:
        """Name -> rows (t, block rows, block columns) to compare implementations on."""


FAMILIES: tuple[Family, ...] = (MiniMaxM3VL(),)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`.

    Raises:
        ConfigError: It is of none; says what is supported.
    """
    for candidate in FAMILIES:
        if candidate.recognises(config):
            return candidate
    supported = ", ".join(candidate.name for candidate in FAMILIES)
    raise ConfigError(
        f"a model family that is not supported: model_type {config.get('model_type')!r}, "
        f"architectures {config.get('architectures')!r}",
        hint=f"supported: {supported}",
    )


def family_from_file(path: Path) -> Family:
    """The family of a checkpoint by its `config.json`.

    Raises:
        ConfigError: The file cannot be read or parsed, or is of no supported family.
    """
    try:
        return family(read_json(path))
    except ManifestError as error:
        if error.reason == "missing":
            raise ConfigError(
                f"{path}: no such file",
                hint="a checkpoint folder holds config.json",
                reason="missing",
            ) from None
        raise ConfigError(str(error), reason=error.reason) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from error
