"""How an engine does attention, and the graph written down for it.

| way | what TensorRT parses | cost of a batch |
| --- | --- | --- |
| plugin | the custom ops as they are, for `libmmvision_plugins.so` | the sum of the images' squares |
| packed | `TRT_Attention`, TensorRT 11's own attention over packed sequences | the sum of the images' squares |
| native | the ops' definitions: one masked product | the square of the batch |
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.graph.passes import inline_functions
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.ops.onnx_functions import ATTENTION_OPSET, AttentionBody, attach_functions

__all__ = [
    "ATTENTION_WAYS",
    "AttentionWay",
    "Lowering",
    "attention_body_for_tensorrt",
    "choose_lowering",
    "lowered_model",
]

AttentionWay = Literal["auto", "plugin", "native", "packed"]
ATTENTION_WAYS: tuple[AttentionWay, ...] = get_args(AttentionWay)

_FIRST_PACKED = (11, 0)


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What was chosen.

    Attributes:
        body: Definition that replaces `VarlenAttention`, or None where the nodes stay for the plugins.
        library: The plugin library, where the nodes stay.
    """

    body: AttentionBody | None
    library: tuple[Path, PluginLibraryRecord] | None = None

    def describe(self, *, fused: bool) -> str:
        """For the sidecar. What begins with `plugin` or `packed` costs no more than its images do one by one."""
        if self.library is not None:
            return "plugin"
        if self.body == "packed":
            return "packed, TensorRT's own"
        return f"{self.body} body, {'fused' if fused else 'left to the builder'}"


def attention_body_for_tensorrt(backend: str, version: str, opset: int) -> AttentionBody:
    """How native attention is written for a TensorRT's ONNX parser.

    ONNX `Attention` (opset 23) is known from TensorRT 10.14 on and becomes one fused layer. Before, and in a graph of a
    lower opset, it is MatMul, Softmax, MatMul, which TensorRT recognises and fuses by itself.
    """
    knows_attention = backend == "tensorrt-rtx" or _parts(version) >= (10, 14)
    return "attention" if knows_attention and opset >= ATTENTION_OPSET else "matmul"


def choose_lowering(
    way: str,
    *,
    backend: str,
    version: str,
    opset: int,
    precision: str,
    config: EncoderConfig,
    compute_capabilities: list[ComputeCapability],
    library: Path,
    progress: Progress,
) -> Lowering:
    """Decide how attention is done.

    Args:
        way: Of `ATTENTION_WAYS`. `auto` is the plugin where it can be, with a note where it is only the library that is
            missing, and otherwise native.
        backend: `tensorrt` or `tensorrt-rtx`.
        version: Of that TensorRT.
        opset: Of the graph.
        precision: Of the graph.
        config: The encoder's dimensions.
        compute_capabilities: GPUs to build for.
        library: Where the plugin library is, if it has been built.
        progress: Told what `auto` passed over.

    Raises:
        EngineError: The way that was asked for is not open; says why.
        ManifestError: The plugin library that was asked for is missing or damaged.
    """
    if way not in ATTENTION_WAYS:
        raise EngineError(f"--attention must be one of {', '.join(ATTENTION_WAYS)}, got {way!r}")
    if way == "packed":
        if backend == "tensorrt" and _parts(version) < _FIRST_PACKED:
            raise EngineError(
                f"TensorRT has packed attention of its own from 11.0 on, this is {version}"
            )
        if not PRECISIONS[precision].has_half_attention:
            raise EngineError(f"packed attention is for fp16 and bf16, not for {precision}")
        return Lowering("packed")
    if way in ("auto", "plugin"):
        obstacle = _obstacle_to_plugins(backend, precision)
        try:
            if obstacle is None:
                return Lowering(
                    None, (library, _fitting(library, version, config, compute_capabilities))
                )
        except (EngineError, ManifestError) as error:
            if way == "plugin":
                raise
            progress.note(f"attention costs the square of the whole batch without plugins: {error}")
        if way == "plugin":
            raise EngineError(f"no plugins: {obstacle}", hint="--attention native, or auto")
    return Lowering(attention_body_for_tensorrt(backend, version, opset))


def _obstacle_to_plugins(backend: str, precision: str) -> str | None:
    if backend == "tensorrt-rtx":
        return "TensorRT-RTX takes none"
    if PRECISIONS[precision].has_half_attention:
        return None
    return f"their kernels are for fp16 and bf16, not for {precision}"


def _fitting(
    library: Path,
    version: str,
    config: EncoderConfig,
    compute_capabilities: list[ComputeCapability],
) -> PluginLibraryRecord:
    """The record of a library that is for this TensorRT and has kernels for this encoder and these GPUs."""
    record = PluginLibraryRecord.read(library)
    headers = record.versions["tensorrt headers"]
    if _parts(headers)[0] != _parts(version)[0]:
        raise EngineError(
            f"{library} was compiled for TensorRT {headers}, this is {version}",
            hint="mmvision build-plugins --force, with the headers of this TensorRT",
        )
    if config.head_dim not in record.head_dims:
        have = ", ".join(map(str, record.head_dims))
        raise EngineError(
            f"{library} has attention kernels for head_dim {have}, this encoder's is {config.head_dim}",
            hint=f"mmvision build-plugins --head-dim {config.head_dim} --force",
        )
    for capability in compute_capabilities:
        if capability < record.compute_capabilities[0]:
            raise EngineError(
                f"{library} has kernels from compute capability {record.compute_capabilities[0]} on, "
                f"not {capability}"
            )
    return record


def lowered_model(graph: Path, lowering: Lowering) -> ir.Model:
    """The graph as the parser shall see it. Weights stay in their file: only the graph is in memory.

    With plugins the nodes stay and their definitions go: TensorRT's parsers do not agree on which of the two comes
    first. Otherwise the definitions take the nodes' place.
    """
    model = ir.load(graph)
    if lowering.body is None:
        model.functions.clear()
        model.opset_imports.setdefault(DOMAIN, 1)
        return model
    attach_functions(model, lowering.body)
    inline_functions(model)
    return model


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
