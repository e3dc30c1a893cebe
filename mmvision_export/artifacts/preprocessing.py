"""The preprocessing of a model directory."""

from __future__ import annotations

from pathlib import Path

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.models.minimax_m3_vl.preprocessor_config import (
    PREPROCESSOR,
    PreprocessorConfig,
)

__all__ = ["preprocessor_of"]


def preprocessor_of(directory: Path, manifest: Manifest) -> PreprocessorConfig:
    """How images become patches in a model directory.

    Directories from before there was a file of it have the encoder's own.

    Raises:
        ManifestError: The file is missing or damaged.
        ConfigError: It is malformed.
    """
    if PREPROCESSOR in manifest.files:
        manifest.verify(directory, [PREPROCESSOR])
    elif not (directory / PREPROCESSOR).is_file():
        return PreprocessorConfig.for_encoder(manifest.config)
    return PreprocessorConfig.read(directory / PREPROCESSOR, manifest.config)
