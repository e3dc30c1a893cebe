"""How an engine does attention, and the graph written down for it.

| way | what TensorRT parses | cost of a batch |
| --- | --- | --- |
| plugin | the custom ops as they are, for `libmmvision_plugins.so` | the sum of the images' squares |
| packed | `TRT_Attention`, TensorRT's own attention over packed sequences | the sum of the images' squares |
| uniform | the ops' definitions: images in slots, padding masked | slots times the square of their length |
| equal | the ops' definitions: images that fill their slots, no mask | the sum of the images' squares |
| native | the ops' definitions: one masked product | the square of the batch |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.build_target import BuildTarget, TensorRTVersion
from mmvision_export.artifacts.engine_record import EngineAttention, NativeBody
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.core.errors import EngineError, ManifestError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import refuse_untrusted
from mmvision_export.engine.choices import ATTENTION_WAYS, SLOT_WAYS, AttentionWay
from mmvision_export.engine.layer_norm import LayerNormForm
from mmvision_export.engine.parser_lowering import write_for_parser
from mmvision_export.engine.parser_support import ParserVersion
from mmvision_export.graph.load import load_graph
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.ops.registry import attach_functions
from mmvision_export.ops.varlen_attention.onnx_op import (
    ATTENTION_OPSET,
    VARLEN_ATTENTION,
    AttentionBody,
)

__all__ = [
    "Lowering",
    "attention_body_for_tensorrt",
    "choose_lowering",
    "lowered_model",
]

_ATTENTION_OF: Mapping[AttentionBody, EngineAttention] = {
    "packed": EngineAttention(way="packed"),
    "attention": EngineAttention(way="native", body="attention"),
    "matmul": EngineAttention(way="native", body="matmul"),
    "uniform_attention": EngineAttention(way="uniform", body="attention"),
    "uniform_matmul": EngineAttention(way="uniform", body="matmul"),
    "equal_attention": EngineAttention(way="equal", body="attention"),
    "equal_matmul": EngineAttention(way="equal", body="matmul"),
}

# 11.0 documents the lengths at other inputs than its own source reads: see `parser_support`.
_FIRST_PACKED = (11, 1)
_LAST_RTX_WITHOUT = (1, 7)  # the last one that was tried


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What was chosen.

    Attributes:
        body: Definition that replaces `VarlenAttention`, or None where the nodes stay for the
            plugins.
        library: The plugin library, where the nodes stay.
        fallback: What to build instead, where the builder cannot build this.
    """

    body: AttentionBody | None
    library: tuple[Path, PluginLibraryRecord] | None = None
    fallback: Lowering | None = None

    @property
    def in_slots(self) -> bool:
        """Whether launches are images in slots."""
        return self.body is not None and _ATTENTION_OF[self.body].way in SLOT_WAYS

    def attention(self, *, fused: bool) -> EngineAttention:
        """For the sidecar."""
        if self.body is None:
            return EngineAttention(way="plugin")
        attention = _ATTENTION_OF[self.body]
        return dataclasses.replace(attention, fused=fused and attention.body is not None)


def attention_body_for_tensorrt(target: BuildTarget) -> NativeBody:
    """How attention of standard operators is written for a TensorRT's ONNX parser.

    ONNX `Attention` (opset 23) is known from TensorRT 10.14 on and becomes one fused layer. Before,
    and in a graph of a lower opset, it is MatMul, Softmax, MatMul, which TensorRT recognises and
    fuses by itself.
    """
    is_known = target.backend == "tensorrt-rtx" or target.tensorrt_version.release >= (10, 14)
    return "attention" if is_known and target.opset >= ATTENTION_OPSET else "matmul"


def choose_lowering(
    way: AttentionWay,
    target: BuildTarget,
    *,
    config: EncoderConfig,
    library: Path,
    is_named: bool,
    in_slots: bool = False,
    progress: Progress,
) -> Lowering:
    """Decide how attention is done.

    Args:
        way: `auto` is the plugin where it can be, with a note where it is only the library that is
            missing; otherwise packed where TensorRT has it; otherwise uniform where the sizes are
            slots; otherwise native. Each is the fallback of the one before. Any other way is built
            or fails.
        target: What is built for.
        config: The encoder's dimensions.
        library: Where the plugin library is, if it has been built.
        is_named: Whether the user named it: any other must have been built here (see `core.trust`).
        in_slots: Whether launches are images in slots, each with its padding.
        progress: Told what `auto` passed over.

    Raises:
        EngineError: The way that was asked for is not open; says why.
        ManifestError: The plugin library that was asked for is missing or damaged.
    """
    if way not in ATTENTION_WAYS:
        raise EngineError(f"attention must be one of {', '.join(ATTENTION_WAYS)}, got {way!r}")
    body = attention_body_for_tensorrt(target)
    native = Lowering(body)
    if way == "native":
        return native
    if way in SLOT_WAYS:
        return Lowering(_slot_body(way, body))
    if way == "packed":
        _refuse_packed(target)
        return Lowering("packed")
    without_plugins = native
    if in_slots:
        without_plugins = Lowering(_slot_body("uniform", body), fallback=without_plugins)
    if way == "auto" and target.backend == "tensorrt" and _obstacle_to_packed(target) is None:
        without_plugins = Lowering("packed", fallback=without_plugins)
    obstacle = _obstacle_to_plugins(target)
    if obstacle is not None:
        if way == "plugin":
            raise EngineError(f"no plugins: {obstacle}", hint="--attention native, or auto")
        return without_plugins
    fallback = without_plugins if way == "auto" else None
    try:
        record = _fitting(library, target, config)
        refuse_untrusted(library, record.library.sha256, named=is_named)
        return Lowering(None, (library, record), fallback)
    except (EngineError, ManifestError) as error:
        if way == "plugin":
            raise
        if without_plugins is native:
            progress.note(
                f"without plugins, attention costs the square of the whole batch: {error.message}"
            )
        elif without_plugins.in_slots:
            progress.note(f"without plugins, images take slots of equal length: {error.message}")
        return without_plugins


def _slot_body(way: AttentionWay, form: NativeBody) -> AttentionBody:
    """The body of a way whose launches are slots, in one of its two forms."""
    (found,) = (
        body
        for body, attention in _ATTENTION_OF.items()
        if (attention.way, attention.body) == (way, form)
    )
    return found


def _refuse_packed(target: BuildTarget) -> None:
    obstacle = _obstacle_to_packed(target)
    if obstacle is not None:
        raise EngineError(f"no packed attention: {obstacle}", hint="--attention uniform, or auto")


def _obstacle_to_packed(target: BuildTarget) -> str | None:
    if target.backend == "tensorrt-rtx" and target.tensorrt_version.release <= _LAST_RTX_WITHOUT:
        # A later one may have a kernel, so its builder is asked.
        return f"TensorRT-RTX {target.tensorrt_version} parses it and has no kernel for it"
    if target.backend == "tensorrt" and target.tensorrt_version.release < _FIRST_PACKED:
        first = ".".join(map(str, _FIRST_PACKED))
        return f"TensorRT has it from {first} on, this is {target.tensorrt_version}"
    if not PRECISIONS[target.precision].has_half_attention:
        return f"it is for fp16 and bf16, not for {target.precision}"
    return None


def _obstacle_to_plugins(target: BuildTarget) -> str | None:
    if target.backend == "tensorrt-rtx":
        return "TensorRT-RTX takes none"
    if target.options.version_compatible:
        # A plan of that kind brings a runtime of its own, with a registry of its own (developer guide,
        # Version Compatibility).
        return "a version-compatible engine runs in the runtime inside it, which has no plugins of ours"
    if PRECISIONS[target.precision].has_half_attention:
        return None
    return f"their kernels are for fp16 and bf16, not for {target.precision}"


def _fitting(library: Path, target: BuildTarget, config: EncoderConfig) -> PluginLibraryRecord:
    """The record of a library for this TensorRT, with kernels for this encoder and these GPUs."""
    record = PluginLibraryRecord.read(library)
    headers = TensorRTVersion(record.versions["tensorrt headers"])
    if headers.release[0] != target.tensorrt_version.release[0]:
        raise EngineError(
            f"{library} was compiled for TensorRT {headers}, this is {target.tensorrt_version}",
            hint="mmvision build-plugins --force, with the headers of this TensorRT",
        )
    if config.head_dim not in record.head_dims:
        have = ", ".join(map(str, record.head_dims))
        raise EngineError(
            f"{library} has attention kernels for head_dim {have}, "
            f"this encoder's is {config.head_dim}",
            hint=f"mmvision build-plugins --head-dim {config.head_dim} --force",
        )
    least = record.compute_capabilities[0]
    for capability in target.compute_capabilities:
        if capability < least:
            raise EngineError(
                f"{library} has kernels from compute capability {least} on, not {capability}"
            )
    return record


def lowered_model(
    graph: Path,
    lowering: Lowering,
    parser: ParserVersion,
    *,
    layer_norms: LayerNormForm | None = None,
) -> ir.Model:
    """The graph as the parser shall see it. Weights stay in their file.

    With plugins the nodes stay and their definitions go: TensorRT's parsers do not agree on which
    of the two comes first. Otherwise the definitions take the nodes' place.

    Args:
        graph: The ONNX file.
        lowering: How attention is done.
        parser: The TensorRT whose parser it is for.
        layer_norms: How LayerNormalization is written; as suits the parser if None.

    Raises:
        EngineError: The graph holds something that cannot be written for this parser.
    """
    model = load_graph(graph)
    if lowering.body is None:
        model.functions.clear()
        model.opset_imports.setdefault(DOMAIN, 1)
    else:
        attach_functions(model, bodies={VARLEN_ATTENTION.name: lowering.body})
    write_for_parser(model, parser, layer_norms=layer_norms)
    return model
