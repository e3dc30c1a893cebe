"""What an engine is made of: its layers by kind, in the words of TensorRT's engine inspector.

The layers themselves lie beside the engine, in the form of the JSON that the inspector writes. The
sidecar has their counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.core.errors import ManifestError

__all__ = ["LayerCounts", "LayerSource", "counts_from_layers", "layers_of", "layers_path"]

LayerSource = Literal["engine inspector", "builder"]
"""Who listed the layers: the inspector of the deserialised engine, or the builder when it was done.
The latter needs no GPU."""

# Kernels of fused attention, by name or tactic: `_gemm_mha_v2_0x52db...` of TensorRT-RTX 1.7 and
# TensorRT, `fmha_v2_flash_attention_...` of TensorRT.
_FUSED_ATTENTION = re.compile(r"(?:^|_)f?mha|flash_attention", re.IGNORECASE)

# By what the inspector says of a tensor, as `Half` or `Row major linear FP16 format (kLINEAR)`; the
# narrowest first.
_TYPES = (
    ("fp4", r"fp4"),
    ("int4", r"int4"),
    ("fp8", r"fp8"),
    ("int8", r"int8"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half"),
    ("fp32", r"fp32|float"),
    ("int32", r"int32"),
    ("int64", r"int64"),
    ("bool", r"bool"),
)
_NARROWEST = [name for name, _ in _TYPES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Layers of an engine, counted. Each profile has layers of its own.

    Attributes:
        file: The layers, beside the engine.
        source: Who listed them.
        count: How many.
        kinds: Layers of each kind, most first. Kinds are TensorRT's: `kgen` is a kernel generated for
            several operations, `gemm` a matrix product.
        precisions: For each kind, layers by the narrowest type that they read, or write where they
            read nothing; `none` where they do neither, `other` where the type is not known.
        fused_attention: Layers that are a fused attention kernel, by their name or tactic.
    """

    file: CompanionFile
    source: LayerSource
    count: int
    kinds: dict[str, int]
    precisions: dict[str, dict[str, int]]
    fused_attention: int

    def __post_init__(self) -> None:
        totals = {kind: sum(types.values()) for kind, types in self.precisions.items()}
        if sum(self.kinds.values()) != self.count or totals != self.kinds:
            raise ManifestError(
                f"kinds and precisions must have the {self.count} layers of count, got {self.kinds} "
                f"and {totals}"
            )

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return f"{self.count} layers: {kinds}; {self.fused_attention} of fused attention"

    def read(self, engine: Path) -> list[dict[str, Any]]:
        """The layers of an engine, from the file beside it.

        Raises:
            ManifestError: The file is missing, damaged or malformed, or has other layers.
        """
        content = self.file.content(engine)
        try:
            layers = layers_of(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{engine.parent / self.file.name}: malformed: {error}") from error
        if len(layers) != self.count:
            raise ManifestError(
                f"{engine.parent / self.file.name} has {len(layers)} layers, the sidecar says {self.count}"
            )
        return layers


def layers_path(engine: Path) -> Path:
    """Where an engine's layers are: the engine's path with `.layers.json` for its last suffix."""
    return engine.with_suffix(".layers.json")


def layers_of(report: Any) -> list[dict[str, Any]]:
    """The layers of an inspector's report.

    An engine that was built without details has a name in the place of each layer.

    Raises:
        ManifestError: It is no such report.
    """
    layers = report.get("Layers") if isinstance(report, dict) else None
    if not isinstance(layers, list) or not all(isinstance(each, (dict, str)) for each in layers):
        raise ManifestError("a report of layers must be an object with a list Layers")
    return [{"Name": each} if isinstance(each, str) else each for each in layers]


def counts_from_layers(
    layers: Sequence[dict[str, Any]], *, file: CompanionFile, source: LayerSource
) -> LayerCounts:
    """Count layers.

    Args:
        layers: As the inspector has them: `Name`, `LayerType`, `Outputs`, `TacticName`.
        file: Where they are.
        source: Who listed them.
    """
    found = [(str(layer.get("LayerType", "unknown")), _precision(layer)) for layer in layers]
    kinds = dict(Counter(kind for kind, _ in found).most_common())
    fused = sum(
        any(_FUSED_ATTENTION.search(str(layer.get(key, ""))) for key in ("Name", "TacticName"))
        for layer in layers
    )
    return LayerCounts(
        file=file,
        source=source,
        count=len(layers),
        kinds=kinds,
        precisions={
            kind: dict(Counter(each for name, each in found if name == kind).most_common())
            for kind in kinds
        },
        fused_attention=fused,
    )


def _precision(layer: dict[str, Any]) -> str:
    """What a layer computes in: an INT8 product reads INT8 and writes float16."""
    for tensors in (layer.get("Inputs"), layer.get("Outputs")):
        if isinstance(tensors, list) and tensors:
            types = [_type(each) for each in tensors]
            return min(types, key=lambda name: (*_NARROWEST, name).index(name))
    return "none"


def _type(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return "other"
    # TensorRT's inspector has both in one; TensorRT-RTX's builder has them apart.
    said = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    # `BFloat16` has `Float` in it, and `UInt8` is none of these.
    words = re.findall(r"[a-z]+\d*", said.lower())
    return next(
        (name for name, kinds in _TYPES if any(re.fullmatch(kinds, w) for w in words)), "other"
    )
