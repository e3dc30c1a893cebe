"""The stages that graph and encoder are compared at, and where each keeps them.

A stage is what a reader of the model would name: the patch embedding, the norm after it, each
layer, the projector, the merger. Its output is the residual stream after a layer, and the result of
the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
from torch import nn

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule

__all__ = [
    "GraphFacts",
    "facts_of_graph",
    "stage_modules",
    "stage_names",
    "stage_shapes",
    "stage_values",
]

_PROJECTOR, _MERGER = "multi_modal_projector", "patch_merge_mlp"
_QUANTIZING = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearMatMul",
        "QGemm",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
    }
)


def stage_names(config: EncoderConfig) -> tuple[str, ...]:
    """Every stage in order of computation, named as the graph's nodes are."""
    layers = (f"layers.{index}" for index in range(config.num_hidden_layers))
    return ("embeddings", "pre_layrnorm", *layers, _PROJECTOR, _MERGER)


def stage_modules(encoder: VisionEncoderModule) -> dict[str, nn.Module]:
    """Stage -> the module whose output it is."""
    tower = encoder.vision_tower.vision_model
    modules = (
        tower.embeddings,
        tower.pre_layrnorm,
        *tower.encoder.layers,
        encoder.multi_modal_projector,
        encoder.patch_merge_mlp,
    )
    return dict(zip(stage_names(encoder.config), modules, strict=True))


def stage_values(graph: ir.Graph, config: EncoderConfig) -> dict[str, ir.Value]:
    """Stage -> the value of a graph that holds its output.

    The last float one made by a node named after the stage.

    In the order of `stage_names`. Nodes are named after modules at export, and what is derived from
    that graph keeps the names. A stage whose nodes were merged into another's, or renamed, is left
    out.
    """
    order = stage_names(config)
    names = frozenset(order)
    found: dict[str, ir.Value] = {}
    for node in graph:  # in topological order
        stage = _stage_of(node.name or "", names)
        output = node.outputs[0]
        if stage is not None and (output.dtype is None or output.dtype.is_floating_point()):
            found[stage] = output
    return {stage: found[stage] for stage in order if stage in found}


def _stage_of(name: str, stages: frozenset[str]) -> str | None:
    parts = name.split(".")
    candidates = (".".join(parts[:2]), parts[0])
    return next((candidate for candidate in candidates if candidate in stages), None)


@dataclasses.dataclass(frozen=True)
class GraphFacts:
    """What decides how a graph is judged, read off the graph itself.

    Attributes:
        precision: Key of the gate table: its float type, or int8 or fp8 if products are quantised.
        float_type: fp32, fp16 or bf16: the type of its hidden states.
        data_files: Names of the files its weights lie in.
    """

    precision: str
    float_type: str
    data_files: tuple[str, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether products are in fewer bits than the hidden states."""
        return self.precision != self.float_type


def facts_of_graph(model: ir.Model) -> GraphFacts:
    """Precision, float type and weight files of a graph of this encoder."""
    tensors = [
        v.const_value for v in model.graph.initializers.values() if v.const_value is not None
    ]
    types = {tensor.dtype for tensor in tensors}
    # A bfloat16 graph takes and gives float32.
    if ir.DataType.BFLOAT16 in types:
        float_type = "bf16"
    else:
        float_type = "fp16" if model.graph.inputs[0].dtype == ir.DataType.FLOAT16 else "fp32"
    precision = float_type
    if any(
        node.op_type in _QUANTIZING for node in model.graph.all_nodes()
    ):  # a CPU flavour's are in subgraphs
        precision = "fp8" if any(dtype.name.startswith("FLOAT8") for dtype in types) else "int8"
    files = dict.fromkeys(str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor))
    return GraphFacts(precision, float_type, tuple(files))


def stage_shapes(config: EncoderConfig, num_patches: int) -> Mapping[str, tuple[int, int]]:
    """Stage -> shape of its output for a batch of this many patches."""
    shapes = dict.fromkeys(stage_names(config), (num_patches, config.hidden_size))
    shapes[_PROJECTOR] = (num_patches, config.text_hidden_size)
    shapes[_MERGER] = (num_patches // config.patches_per_token, config.text_hidden_size)
    return shapes
