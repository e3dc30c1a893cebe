"""The CPU flavour of the graph, `model.cpu.onnx`: the same function and weight file, laid out for ONNX Runtime.

The portable graph is what any runtime can take. Three things make it slow on a CPU, and are different here:

* Its attention is masked: work and memory grow with the square of the batch. Here `VarlenAttention` is defined by a
  `Loop` over the images, in which each attends to itself alone, in `com.microsoft::MultiHeadAttention`, a flash kernel
  whose memory is linear.
* Each operator passes over the whole batch before the next begins. At 4096 patches the inner activations of one MLP are
  84 MB, more than any cache holds. Here everything between one layer's attention and the next layer's runs as a `Scan`
  over blocks of at most `BLOCK_PATCHES` patches, whose activations stay in the cache and are never all there at once.
* Its rotation is a dozen elementwise operators. Here it is one, `com.microsoft::RotaryEmbedding`.

The products and attention are operators of ours, which carry their definition in ONNX Runtime's as functions, so that
its kernels or those of `plugins/amx` can run them.

Blocks are of equal size, as Scan needs, so that the batch is padded at its end by less than an image token a block.
The padding is in no image and is cut off again. The graph is written in ONNX's textual syntax
(https://github.com/onnx/onnx/blob/main/docs/Syntax.md); the operators of `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from mmvision_export.core.errors import ExportError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = ["BLOCK_PATCHES", "cpu_graph_from_portable"]

BLOCK_PATCHES = 768
"""Most patches of a block: enough rows for a matrix product at nearly full speed, few enough for little memory."""

_CONTRIB = "com.microsoft"

# The syntax has no dots in the names of values.
_DOT = "__"
_DOTTED = re.compile(rf"(?<![\w.])(?!com\.microsoft|{DOMAIN}\.)[a-z_]\w*(?:\.\w+)+")

# Sizes [1] int64. The blocks are as equal as whole image tokens allow, to pad least.
_BLOCKS = """
  num_patches = Shape <start: int = 0, end: int = 1> (pixel_values)
  most = Constant <value_ints: ints = [{most}]> ()
  most_less_1 = Constant <value_ints: ints = [{most_less_1}]> ()
  per_token = Constant <value_ints: ints = [{per_token}]> ()
  zero = Constant <value_ints: ints = [0]> ()
  one = Constant <value_ints: ints = [1]> ()
  minus_1 = Constant <value_ints: ints = [-1]> ()
  rounded_up = Add (num_patches, most_less_1)
  num_blocks = Div (rounded_up, most)
  num_tokens = Div (num_patches, per_token)
  blocks_less_1 = Sub (num_blocks, one)
  tokens_rounded_up = Add (num_tokens, blocks_less_1)
  block_tokens = Div (tokens_rounded_up, num_blocks)
  block_patches = Mul (block_tokens, per_token)
  padded_patches = Mul (block_patches, num_blocks)
  padding = Sub (padded_patches, num_patches)
  pads = Concat <axis: int = 0> (zero, zero, padding, zero)
  in_blocks = Concat <axis: int = 0> (num_blocks, block_patches, minus_1)
  heads = Constant <value_ints: ints = [-1, {heads}, {head_dim}]> ()
  merged = Constant <value_ints: ints = [-1, {merged}]> ()
  tokens_packed = Constant <value_ints: ints = [-1, {text_hidden}]> ()
  patches_padded = Pad (pixel_values, pads)
  patches_blocks = Reshape (patches_padded, in_blocks)
  cos_padded = Pad ({cos}, pads)
  cos_blocks = Reshape (cos_padded, in_blocks)
  sin_padded = Pad ({sin}, pads)
  sin_blocks = Reshape (sin_padded, in_blocks)
"""

# One block's rows: x [block, hidden] -> q, k, v [block, hidden], q and k rotated.
_QKV = """
    {p}normed = LayerNormalization <axis: int = -1, epsilon: float = {epsilon}> (
      {x}, {layer}.layer_norm1.weight, {layer}.layer_norm1.bias)
    {p}q_flat = mmvision.Linear ({p}normed, {layer}.self_attn.q_proj.weight, {layer}.self_attn.q_proj.bias)
    {p}k_flat = mmvision.Linear ({p}normed, {layer}.self_attn.k_proj.weight, {layer}.self_attn.k_proj.bias)
    {p}v = mmvision.Linear ({p}normed, {layer}.self_attn.v_proj.weight, {layer}.self_attn.v_proj.bias)
    {p}q_batch = Unsqueeze ({p}q_flat, zero)
    {p}k_batch = Unsqueeze ({p}k_flat, zero)
    {p}q_rotated = com.microsoft.RotaryEmbedding <num_heads: int = {heads}, rotary_embedding_dim: int = {rope_dim}> (
      {p}q_batch, zero, {p}cos, {p}sin)
    {p}k_rotated = com.microsoft.RotaryEmbedding <num_heads: int = {heads}, rotary_embedding_dim: int = {rope_dim}> (
      {p}k_batch, zero, {p}cos, {p}sin)
    {p}q = Squeeze ({p}q_rotated, zero)
    {p}k = Squeeze ({p}k_rotated, zero)
"""

_EMBED = """
    {p}embedded = mmvision.Linear ({p}patches, embeddings.patch_embedding.weight)
    {p}x = LayerNormalization <axis: int = -1, epsilon: float = {epsilon}> (
      {p}embedded, pre_layrnorm.weight, pre_layrnorm.bias)
"""

# The rest of a layer, after its attention.
_LAYER = """
    {p}projected = mmvision.Linear (
      {p}attended, {layer}.self_attn.out_proj.weight, {layer}.self_attn.out_proj.bias)
    {p}between = Add ({p}x_in, {p}projected)
    {p}between_normed = LayerNormalization <axis: int = -1, epsilon: float = {epsilon}> (
      {p}between, {layer}.layer_norm2.weight, {layer}.layer_norm2.bias)
    {p}activated = mmvision.LinearGelu ({p}between_normed, {layer}.mlp.fc1.weight, {layer}.mlp.fc1.bias)
    {p}outer = mmvision.Linear ({p}activated, {layer}.mlp.fc2.weight, {layer}.mlp.fc2.bias)
    {p}x = Add ({p}between, {p}outer)
"""

# Patches become image tokens in the block too: what they are made of is nineteen times as wide as a patch's features.
_PROJECTOR = """
    {p}proj_activated = mmvision.LinearGelu ({p}x, {linear_1})
    {p}projected_out = mmvision.Linear ({p}proj_activated, {linear_2})
    {p}token_rows = Reshape ({p}projected_out, merged)
    {p}merge_activated = mmvision.LinearGelu ({p}token_rows, {merge_1})
    {p}tokens = mmvision.Linear ({p}merge_activated, {merge_2})
"""

# The last blocks' padding lies behind the last segment.
_ATTENTION = """
  {p}q_heads = Reshape ({block}q_blocks, heads)
  {p}k_heads = Reshape ({block}k_blocks, heads)
  {p}v_heads = Reshape ({block}v_blocks, heads)
  {p}attended = mmvision.VarlenAttention <scale: float = {scale}> ({p}q_heads, {p}k_heads, {p}v_heads, {cu_seqlens})
  {p}attended_blocks = Reshape ({p}attended, in_blocks)
"""

# The operators' definitions, which ONNX Runtime runs where the kernels of plugins/amx are not at hand.
_LINEAR = """
<domain: "mmvision", opset_import: ["": {opset}]>
Linear (x, weight, bias) => (y) {{
  y = Gemm <transB: int = 1> (x, weight, bias)
}}
"""

_LINEAR_GELU = """
<domain: "mmvision", opset_import: ["": {opset}, "com.microsoft": 1]>
LinearGelu (x, weight, bias) => (y) {{
  inner = Gemm <transB: int = 1> (x, weight, bias)
  y = com.microsoft.Gelu (inner)
}}
"""

# Attention of each segment by itself. What remains behind the last may be anything finite.
_VARLEN_ATTENTION = """
<domain: "mmvision", opset_import: ["": {opset}, "com.microsoft": 1]>
VarlenAttention <scale> (q, k, v, cu_seqlens) => (out) {{
  zero = Constant <value_ints: ints = [0]> ()
  one = Constant <value_ints: ints = [1]> ()
  minus_1 = Constant <value_ints: ints = [-1]> ()
  true = Constant <value: tensor = bool {{1}}> ()
  packed = Constant <value_ints: ints = [0, -1]> ()
  q_packed = Reshape (q, packed)
  k_packed = Reshape (k, packed)
  v_packed = Reshape (v, packed)
  bounds = Cast <to: int = 7> (cu_seqlens)
  num_bounds = Size (bounds)
  one_scalar = Squeeze (one)
  num_segments = Sub (num_bounds, one_scalar)
  none = SequenceEmpty <dtype: int = 1> ()
  segments = Loop (num_segments, true, none) <
    body: graph = segment (int64 index, bool go_on, seq(float[rows, hidden]) before)
      => (bool go_on_out, seq(float[rows, hidden]) after) {{
    go_on_out = Identity (go_on)
    first_bound = Unsqueeze (index, zero)
    second_bound = Add (first_bound, one)
    start = Gather (bounds, first_bound)
    end = Gather (bounds, second_bound)
    q_rows = Slice (q_packed, start, end, zero)
    k_rows = Slice (k_packed, start, end, zero)
    v_rows = Slice (v_packed, start, end, zero)
    q_segment = Unsqueeze (q_rows, zero)
    k_segment = Unsqueeze (k_rows, zero)
    v_segment = Unsqueeze (v_rows, zero)
    segment_out = com.microsoft.MultiHeadAttention <num_heads: int = {heads}, scale: float = @scale> (
      q_segment, k_segment, v_segment)
    rows_out = Squeeze (segment_out, zero)
    after = SequenceInsert (before, rows_out)
  }}>
  last_bound = Gather (bounds, minus_1)
  num_rows = Shape <start: int = 0, end: int = 1> (v)
  behind = Slice (v_packed, last_bound, num_rows, zero)
  all_rows = SequenceInsert (segments, behind)
  out_packed = ConcatFromSequence <axis: int = 0> (all_rows)
  shape = Shape (q)
  out = Reshape (out_packed, shape)
}}
"""

_DEFINITIONS = (_LINEAR, _LINEAR_GELU, _VARLEN_ATTENTION)

_TOKENS = """
  tokens_padded = Reshape (tokens_blocks, tokens_packed)
  image_embeds = Slice (tokens_padded, zero, num_tokens, zero)
"""


def cpu_graph_from_portable(
    path: Path, config: EncoderConfig, *, block_patches: int = BLOCK_PATCHES
) -> onnx.ModelProto:
    """The CPU flavour of a portable float32 graph, with references into the same weight file.

    Args:
        path: The portable graph, `model.onnx`; its weights are not read.
        config: The encoder's dimensions.
        block_patches: Most patches of a block.

    Returns:
        A model with the portable one's inputs and outputs. Save it in the same directory.

    Raises:
        ExportError: The graph is not float32, or not one that this package exports.
    """
    portable = onnx.load(path, load_external_data=False)
    if (kind := portable.graph.input[0].type.tensor_type.elem_type) != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind).lower()
        raise ExportError(f"only a float32 graph has a CPU flavour, {path.name} takes {name}")
    custom = {node.op_type: node for node in portable.graph.node if node.domain == DOMAIN}
    if set(custom) != {"QKRotaryEmbedding", "VarlenAttention"}:
        raise ExportError(
            f"{path} has not the custom ops of an exported encoder, but {sorted(custom) or 'none'}"
        )
    _, _, cos, sin = custom["QKRotaryEmbedding"].input
    cu_seqlens = custom["VarlenAttention"].input[3]
    scale = next(a.f for a in custom["VarlenAttention"].attribute if a.name == "scale")

    weights = {tensor.name for tensor in portable.graph.initializer}
    text = _graph_text(
        config, weights, block_patches, scale=scale, cos=cos, sin=sin, cu_seqlens=cu_seqlens
    )
    body = onnx.parser.parse_graph(_DOTTED.sub(lambda name: name[0].replace(".", _DOT), text))
    _finish(body)
    nodes = [*_ancestors(portable.graph, {cos, sin, cu_seqlens}), *body.node]
    used = {name for node in _with_subgraphs(nodes) for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "cpu",
        portable.graph.input,
        portable.graph.output,
        [tensor for tensor in portable.graph.initializer if tensor.name in used],
    )
    opset = next(
        entry.version for entry in portable.opset_import if entry.domain in ("", "ai.onnx")
    )
    facts = {"opset": opset, "heads": config.num_attention_heads}
    return onnx.helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(body.format(**facts)) for body in _DEFINITIONS],
        producer_name=portable.producer_name,
        producer_version=portable.producer_version,
        ir_version=portable.ir_version,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(_CONTRIB, 1),
            onnx.helper.make_opsetid(DOMAIN, OP_VERSION),
        ],
    )


def _graph_text(
    config: EncoderConfig,
    weights: set[str],
    block_patches: int,
    *,
    scale: float,
    cos: str,
    sin: str,
    cu_seqlens: str,
) -> str:
    """The graph from the blocks on, as text; what it reads of the portable graph are names."""
    facts = {
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "merged": config.patches_per_token * config.text_hidden_size,
        "text_hidden": config.text_hidden_size,
        "rope_dim": config.rope_dim,
        "epsilon": f"{config.layer_norm_eps:.9g}",
        "scale": f"{scale:.9g}",
    }

    def linear(name: str) -> str:
        bias = f"{name}.bias"
        return f"{name}.weight, {bias}" if bias in weights else f"{name}.weight"

    parts = [
        _BLOCKS.format(
            most=block_patches,
            most_less_1=block_patches - 1,
            per_token=config.patches_per_token,
            cos=cos,
            sin=sin,
            **facts,
        )
    ]
    last = config.num_hidden_layers
    for index in range(last + 1):
        p = f"blocks.{index}."
        layer = f"layers.{index}"
        inside = [
            _EMBED.format(p=p, **facts)
            if index == 0
            else _LAYER.format(p=p, layer=f"layers.{index - 1}", **facts)
        ]
        if index < last:
            inside.append(_QKV.format(p=p, layer=layer, x=f"{p}x", **facts))
            results = {"x": "x_blocks", "q": "q_blocks", "k": "k_blocks", "v": "v_blocks"}
        else:
            projector = [linear(f"multi_modal_projector.linear_{number}") for number in (1, 2)]
            merger = [linear(f"patch_merge_mlp.linear_{number}") for number in (1, 2)]
            linears = dict(
                zip(("linear_1", "linear_2", "merge_1", "merge_2"), projector + merger, strict=True)
            )
            inside.append(_PROJECTOR.format(p=p, **linears))
            results = {"tokens": "tokens_blocks"}
        before_x, before_attended = (
            f"blocks.{index - 1}.x_blocks",
            f"layers.{index - 1}.attention.attended_blocks",
        )
        fed = (
            {"patches": "patches_blocks"}
            if index == 0
            else {"x_in": before_x, "attended": before_attended}
        )
        if index < last:
            fed |= {"cos": "cos_blocks", "sin": "sin_blocks"}
        scanned = ", ".join(f"float[{p}rows, {p}{name}_width] {p}{name}" for name in fed)
        body_outputs = ", ".join(
            f"float[{p}{name}_rows, {p}{name}_width] {p}{name}" for name in results
        )
        outputs = ", ".join(name if index == last else f"{p}{name}" for name in results.values())
        parts.append(
            f"  {outputs} = Scan <num_scan_inputs: int = {len(fed)}, body: graph = block_{index} ({scanned})\n"
            f"      => ({body_outputs}) {{{''.join(inside)}  }}> ({', '.join(fed.values())})\n"
        )
        if index < last:
            attention = f"{layer}.attention."
            parts.append(_ATTENTION.format(p=attention, block=p, cu_seqlens=cu_seqlens, **facts))
    parts.append(_TOKENS)
    return f"cpu (float[n, d] pixel_values) => (float[t, h] image_embeds) {{{''.join(parts)}}}"


def _ancestors(graph: onnx.GraphProto, wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that some values are computed from, in the graph's order."""
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted = wanted.union(node.input)
    return kept[::-1]


def _with_subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _with_subgraphs(attribute.g.node)


def _finish(graph: onnx.GraphProto) -> None:
    """Give values their dots again, and nodes the names of their outputs, which a profiler's table shows.

    And say the type of what comes out of operators of `com.microsoft`, which the checker does not know.
    """
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace(_DOT, ".")
    for node in graph.node:
        node.input[:] = [name.replace(_DOT, ".") for name in node.input]
        node.output[:] = [name.replace(_DOT, ".") for name in node.output]
        node.name = node.output[0]
        if node.op_type == "LinearGelu":
            graph.value_info.add().CopyFrom(
                onnx.helper.make_tensor_value_info(node.name, onnx.TensorProto.FLOAT, [None, None])
            )
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _finish(attribute.g)
