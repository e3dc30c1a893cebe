"""Where an encoder's weights come from, as a value that the manifest keeps."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from mmvision_export.core.errors import CheckpointError
from mmvision_export.core.precision import FLOAT_PRECISIONS, PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.models import Family, family_from_file
from mmvision_export.models.hub import folder_from_hub, is_hub_id
from mmvision_export.models.minimax_m3_vl.checkpoint import (
    CONFIG,
    digest_of_tensor,
    digest_of_tensors,
)
from mmvision_export.models.minimax_m3_vl.config import PRESETS, EncoderConfig, Preset
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.family import MiniMaxM3VL
from mmvision_export.models.minimax_m3_vl.preprocess import PREPROCESSOR
from mmvision_export.models.random_kind import RandomKind
from mmvision_export.models.random_weights import random_tensors

__all__ = ["DTYPES", "LoadedEncoder", "WeightSource"]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, PRECISIONS[name].dtype) for name in FLOAT_PRECISIONS
}
"""Precision -> PyTorch dtype of an encoder in it."""


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
    """An encoder and what there is to say about its weights.

    Attributes:
        encoder: In evaluation mode.
        source: For the manifest's `source`.
        preprocessor: The checkpoint's `preprocessor_config.json`, if it has one.
        family: The model family that the encoder is of.
    """

    encoder: VisionEncoderModule
    source: dict[str, Any]
    preprocessor: Path | None
    family: Family


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """A checkpoint (folder or hub id), or seeded random weights of a preset or config.

    Attributes:
        checkpoint: Folder or hub id; None for random weights.
        revision: Of the hub repository.
        random_config: Dimensions for random weights.
        preset: Name of those dimensions, if they are a preset's.
        seed: For random weights.
        random_kind: `plain` random weights, or with `outliers`.
        may_download: Whether a hub id may be downloaded; otherwise it must be in the hub's cache.
    """

    checkpoint: str | None = None
    revision: str | None = None
    random_config: EncoderConfig | None = None
    preset: str | None = None
    seed: int = 0
    random_kind: RandomKind = "plain"
    may_download: bool = True

    @classmethod
    def random(cls, preset: Preset, seed: int, kind: RandomKind = "plain") -> WeightSource:
        """Seeded random weights in a preset's dimensions."""
        return cls(random_config=PRESETS[preset], preset=preset, seed=seed, random_kind=kind)

    @classmethod
    def from_manifest(cls, source: dict[str, Any], config: EncoderConfig) -> WeightSource:
        """The source that a manifest names.

        A manifest may come from anybody: it has nothing downloaded with this user's token.
        """
        if source.get("kind") == "random":
            return cls(
                random_config=config,
                preset=source.get("preset"),
                seed=source["seed"],
                random_kind=source.get("random_kind", "plain"),
            )
        return cls(
            checkpoint=source["checkpoint"],
            revision=source.get("commit") or source.get("revision"),
            may_download=False,
        )

    def load(self, dtype: torch.dtype, progress: Progress | None = None) -> LoadedEncoder:
        """Load or make the weights.

        Raises:
            ConfigError: See `config_from_file`.
            CheckpointError: See `checkpoint_from_folder` and `folder_from_hub`.
        """
        progress = progress or Progress()
        if self.random_config is not None:
            progress.step("making random weights")
            state, digests = {}, {}
            for name, tensor in random_tensors(
                self.random_config, seed=self.seed, kind=self.random_kind
            ):
                state[name], digests[name] = tensor.to(dtype), digest_of_tensor(tensor)
            source: dict[str, Any] = {
                "kind": "random",
                "random_kind": self.random_kind,
                "preset": self.preset,
                "seed": self.seed,
            }
            source["sha256"] = digest_of_tensors(digests)
            family: Family = MiniMaxM3VL()  # the presets' family
            encoder = family.encoder_from_state_dict(self.random_config, state)
            return LoadedEncoder(encoder, source, None, family)

        assert self.checkpoint is not None
        folder = Path(self.checkpoint).expanduser()
        name = str(folder.resolve())
        commit = None
        if folder.is_dir():
            if self.revision is not None:
                raise CheckpointError(
                    f"{folder} is a folder, and a folder has no revision",
                    hint="leave --revision out",
                )
        else:
            if folder.exists() or not is_hub_id(self.checkpoint):
                raise CheckpointError(
                    f"{self.checkpoint}: no such checkpoint folder",
                    reason="missing",
                    hint="name a folder or a hub id (organisation/model) with --checkpoint, "
                    "or try without weights: --preset tiny --random-weights",
                )
            folder = folder_from_hub(
                self.checkpoint,
                revision=self.revision,
                may_download=self.may_download,
                progress=progress,
            )
            name, commit = self.checkpoint, folder.name  # a snapshot folder is named by its commit
        family = family_from_file(folder / CONFIG)
        checkpoint = family.checkpoint_from_folder(folder, dtype=dtype, progress=progress)
        source = {
            "kind": "checkpoint",
            "checkpoint": name,
            "revision": self.revision,
            "commit": commit,
            "sha256": checkpoint.sha256,
            "shards": checkpoint.shards,
        }
        preprocessor = folder / PREPROCESSOR
        return LoadedEncoder(
            family.encoder_from_state_dict(checkpoint.config, checkpoint.state_dict),
            source,
            # What is there and no regular file is refused where it is read, not passed over.
            preprocessor if os.path.lexists(preprocessor) else None,
            family,
        )
