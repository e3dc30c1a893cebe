"""The CPU flavour from the portable graph: blocks of patches, and attention between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmvision_export.core.errors import ExportError
from mmvision_export.graph.cpu.blocks import BlockWriter
from mmvision_export.graph.cpu.functions import CONTRIB, cpu_functions
from mmvision_export.graph.cpu.portable import PortableEncoder
from mmvision_export.graph.naming_tape import NamingTape
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.ops.domain import DOMAIN, OP_VERSION

__all__ = ["BLOCK_PATCHES", "cpu_graph_from_portable"]

BLOCK_PATCHES = 768
"""Most patches of a block: enough for a product at nearly full speed, few for little memory."""


def cpu_graph_from_portable(
    path: Path, config: EncoderConfig, *, block_patches: int = BLOCK_PATCHES
) -> ir.Model:
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
    model = ir.load(path)
    graph = model.graph
    try:
        encoder = PortableEncoder.of(graph)
    except ExportError as error:
        raise ExportError(f"{path}: {error}", hint=error.hint) from error
    tape = NamingTape()
    blocks = _cut_into_blocks(tape, graph.inputs[0], encoder, config, block_patches=block_patches)
    image_embeds = _write_layers(tape, blocks, encoder, config)
    graph.extend(tape.nodes)
    portable_output = graph.outputs[0]
    image_embeds.type, image_embeds.shape = portable_output.type, portable_output.shape
    image_embeds.metadata_props.update(portable_output.metadata_props)
    graph.outputs[0] = image_embeds
    # Of the portable graph, this leaves the geometry: what cos, sin and cu_seqlens are computed
    # from.
    RemoveUnusedNodesPass()(model)
    graph.name = "cpu"
    opset = model.opset_imports[""]
    functions = cpu_functions(opset=opset, heads=config.num_attention_heads)
    model.functions.clear()
    model.functions.update({function.identifier(): function for function in functions})
    model.opset_imports.clear()
    model.opset_imports.update({"": opset, CONTRIB: 1, DOMAIN: OP_VERSION})
    return model


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The batch in blocks of equal size, and the sizes and shapes that the graph uses again.

    Attributes:
        patches: `[num_blocks, B, patch_dim]`, padded at the end.
        cos: `[num_blocks, B, rope_dim/2]`.
        sin: As cos.
        shape: `(num_blocks, B, -1)`.
        heads: `(-1, heads, head_dim)`.
        merged: `(-1, merge**2 * text_hidden)`, an image token's patches.
        tokens: `(-1, text_hidden)`.
        num_tokens: `[1]`, of the batch before padding.
        zero: `[1]`.
    """

    patches: ir.Value
    cos: ir.Value
    sin: ir.Value
    shape: ir.Value
    heads: ir.Value
    merged: ir.Value
    tokens: ir.Value
    num_tokens: ir.Value
    zero: ir.Value


def _cut_into_blocks(
    tape: NamingTape,
    pixel_values: ir.Value,
    encoder: PortableEncoder,
    config: EncoderConfig,
    *,
    block_patches: int,
) -> _Blocks:
    """Blocks as equal as whole image tokens allow, to pad least. Sizes are `[1]` int64."""
    num_patches = tape.op("num_patches", "Shape", pixel_values, start=0, end=1)
    most = tape.constant("most", block_patches)
    most_less_1 = tape.constant("most_less_1", block_patches - 1)
    per_token = tape.constant("per_token", config.patches_per_token)
    zero = tape.constant("zero", 0)
    one = tape.constant("one", 1)
    minus_1 = tape.constant("minus_1", -1)
    rounded_up = tape.op("rounded_up", "Add", num_patches, most_less_1)
    num_blocks = tape.op("num_blocks", "Div", rounded_up, most)
    num_tokens = tape.op("num_tokens", "Div", num_patches, per_token)
    blocks_less_1 = tape.op("blocks_less_1", "Sub", num_blocks, one)
    tokens_rounded_up = tape.op("tokens_rounded_up", "Add", num_tokens, blocks_less_1)
    block_tokens = tape.op("block_tokens", "Div", tokens_rounded_up, num_blocks)
    patches_of_block = tape.op("block_patches", "Mul", block_tokens, per_token)
    padded_patches = tape.op("padded_patches", "Mul", patches_of_block, num_blocks)
    padding = tape.op("padding", "Sub", padded_patches, num_patches)
    pads = tape.op("pads", "Concat", zero, zero, padding, zero, axis=0)
    in_blocks = tape.op("in_blocks", "Concat", num_blocks, patches_of_block, minus_1, axis=0)
    heads = tape.constant("heads", -1, config.num_attention_heads, config.head_dim)
    merged = tape.constant("merged", -1, config.patches_per_token * config.text_hidden_size)
    tokens = tape.constant("tokens_packed", -1, config.text_hidden_size)

    def cut(name: str, rows: ir.Value) -> ir.Value:
        # [N, width] -> [num_blocks, B, width]
        padded = tape.op(f"{name}_padded", "Pad", rows, pads)
        return tape.op(f"{name}_blocks", "Reshape", padded, in_blocks)

    return _Blocks(
        patches=cut("patches", pixel_values),
        cos=cut("cos", encoder.cos),
        sin=cut("sin", encoder.sin),
        shape=in_blocks,
        heads=heads,
        merged=merged,
        tokens=tokens,
        num_tokens=num_tokens,
        zero=zero,
    )


def _write_layers(
    tape: NamingTape, blocks: _Blocks, encoder: PortableEncoder, config: EncoderConfig
) -> ir.Value:
    """Blocks and attention in turn, one block more than there are layers; gives image_embeds."""
    fed = {"patches": blocks.patches}
    for index in range(config.num_hidden_layers):
        body = _block_body(
            index, [*fed, "cos", "sin"], blocks=blocks, encoder=encoder, config=config
        )
        x, q, k, v = tape.scan(
            body,
            [*fed.values(), blocks.cos, blocks.sin],
            [f"blocks.{index}.{name}_blocks" for name in ("x", "q", "k", "v")],
        )
        attended = _attention(tape, f"layers.{index}.attention.", (q, k, v), blocks, encoder)
        fed = {"x_in": x, "attended": attended}
    body = _block_body(
        config.num_hidden_layers, list(fed), blocks=blocks, encoder=encoder, config=config
    )
    (tokens_blocks,) = tape.scan(body, list(fed.values()), ["tokens_blocks"])
    # [num_blocks, B / merge**2, text_hidden] -> [num_tokens, text_hidden]
    padded = tape.op("tokens_padded", "Reshape", tokens_blocks, blocks.tokens)
    return tape.op("image_embeds", "Slice", padded, blocks.zero, blocks.num_tokens, blocks.zero)


def _block_body(
    index: int,
    names: Sequence[str],
    *,
    blocks: _Blocks,
    encoder: PortableEncoder,
    config: EncoderConfig,
) -> ir.Graph:
    """What is done with one block: the end of layer `index - 1`, the beginning of layer `index`.

    Args:
        index: From 0, which embeds the patches, to the number of layers, which projects.
        names: The inputs': `patches`, or `x_in` and `attended`; and `cos` and `sin` but for the
            last.
        blocks: The values of the outer graph.
        encoder: Whose weights are used.
        config: Its dimensions.
    """
    prefix = f"blocks.{index}."
    tape = NamingTape(prefix)
    given = {name: ir.Value(name=f"{prefix}{name}") for name in names}
    for name, value in given.items():
        _make_rows(value, f"{prefix}rows", f"{prefix}{name}_width")
    writer = BlockWriter(tape, encoder, config, blocks.zero)
    if index == 0:
        x = writer.embed(given["patches"])
    else:
        x = writer.after_attention(given["x_in"], given["attended"], f"layers.{index - 1}")
    if index < config.num_hidden_layers:
        q_k_v = writer.before_attention(x, given["cos"], given["sin"], f"layers.{index}")
        results = [x, *q_k_v]
    else:
        results = [writer.project(x, blocks.merged)]
    for value in results:
        _make_rows(value, f"{value.name}_rows", f"{value.name}_width")
    return ir.Graph(list(given.values()), results, nodes=tape.nodes, name=f"block_{index}")


def _make_rows(value: ir.Value, rows: str, width: str) -> None:
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, width])


def _attention(
    tape: NamingTape,
    prefix: str,
    q_k_v: Sequence[ir.Value],
    blocks: _Blocks,
    encoder: PortableEncoder,
) -> ir.Value:
    """`[num_blocks, B, hidden]` of q, k and v. The padding lies behind the last segment."""
    # [num_blocks, B, hidden] -> [num_blocks * B, heads, head_dim], and back.
    q, k, v = (
        tape.op(f"{prefix}{name}_heads", "Reshape", value, blocks.heads)
        for name, value in zip("qkv", q_k_v, strict=True)
    )
    attended = tape.op(
        f"{prefix}attended",
        "VarlenAttention",
        q,
        k,
        v,
        encoder.cu_seqlens,
        domain=DOMAIN,
        scale=encoder.scale,
    )
    return tape.op(f"{prefix}attended_blocks", "Reshape", attended, blocks.shape)
