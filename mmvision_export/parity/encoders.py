"""The PyTorch encoder once more, with the weights that were exported."""

from __future__ import annotations

import dataclasses

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import ParityError
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.parity.float64 import Float64Encoder

__all__ = ["Encoders"]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Loads the encoder in any float type, anew each time: one of them is in memory at a time.

    Attributes:
        source: Where the weights come from.
        manifest: Of the model directory, which knows the weights' hash.
    """

    source: WeightSource
    manifest: Manifest

    def load(self, float_type: str) -> VisionEncoderModule:
        """The encoder in fp32, fp16 or bf16.

        Raises:
            CheckpointError: The weights cannot be loaded.
            ParityError: They are not those that were exported.
        """
        loaded = self.source.load(DTYPES[float_type])
        exported, now = self.manifest.source.get("sha256"), loaded.source.get("sha256")
        if exported and now and exported != now:
            raise ParityError(
                f"the weights have sha256 {now}, the exported weights had {exported}",
                hint="name the checkpoint that was exported with --checkpoint, or export again",
            )
        return loaded.encoder

    def load_reference(self) -> VisionEncoderModule:
        """The encoder in float64; raises as `load` does."""
        return Float64Encoder(self.load("fp32"))
