"""Faults to plant into exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.files import file_record
from mmvision_export.graph.files import save_cpu_graph, save_uniform_graph
from tests.support.configs import HEAD_DIM_80


def rewrite(directory: Path, change: Callable[[ir.Model], None]) -> None:
    """Change the graph of a model directory, and its manifest with it."""
    model = ir.load(directory / "model.onnx")
    change(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, directory / "model.onnx", external_data="model.onnx.data")
    manifest = Manifest.read(directory)
    save_cpu_graph(directory, manifest.config)  # the weights lie elsewhere in their file now
    save_uniform_graph(directory)
    for name in ("model.onnx", "model.cpu.onnx", "model.uniform.onnx", "model.onnx.data"):
        manifest.files[name] = file_record(directory / name)
    manifest.write(directory)


def scale_weights(model: ir.Model, layer: int = 1) -> None:
    value = model.graph.initializers[f"layers.{layer}.mlp.fc1.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001), name=value.name)


def leak_between_images(model: ir.Model) -> None:
    function = model.functions["mmvision", "VarlenAttention", ""]
    equal = next(node for node in function if node.op_type == "Equal")
    equal.op_type = "GreaterOrEqual"  # a patch sees its own image and those before it


def swap_rotation(model: ir.Model) -> None:
    function = model.functions["mmvision", "QKRotaryEmbedding", ""]
    next(node for node in function if node.op_type == "Sub").op_type = "Add"


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def interleave_rotary_pairs(model: ir.Model) -> None:
    """Layer 1 pairs channels (0, 1), (2, 3) and so on, as GPT-J does, rather than i with i + 39."""
    rotary = node_of(model, "layers.1.self_attn.QKRotaryEmbedding")
    half = HEAD_DIM_80.rope_dim // 2
    order = np.arange(HEAD_DIM_80.head_dim)
    order[: 2 * half] = np.concatenate([np.arange(half) * 2, np.arange(half) * 2 + 1])
    gather(model, rotary, order)


def gather(model: ir.Model, rotary: ir.Node, order: np.ndarray) -> None:
    """Rotate the channels in another order, and put them back."""
    for name, indices in (("there", order), ("back", np.argsort(order))):
        value = ir.Value(name=name, const_value=ir.tensor(indices.astype(np.int64), name=name))
        model.graph.initializers.add(value)
    for index in (0, 1):
        taken, given = rotary.inputs[index], rotary.outputs[index]
        assert taken is not None
        uses = list(given.uses())
        before = ir.node(
            "Gather", [taken, model.graph.initializers["there"]], attributes={"axis": 2}
        )
        after = ir.node("Gather", [given, model.graph.initializers["back"]], attributes={"axis": 2})
        before.name, after.name = f"before_{index}", f"after_{index}"
        for node in (before, after):
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
                node.name,
                taken.type,
                taken.shape,
            )
        model.graph.insert_before(rotary, before)
        rotary.replace_input_with(index, before.outputs[0])
        model.graph.insert_after(rotary, after)
        for user, at in uses:
            user.replace_input_with(at, after.outputs[0])


def statistics_in_float16(model: ir.Model) -> None:
    """In a lowered graph, layer norms that are written as separate operators compute in float16."""
    for node in model.graph:
        inner = (node.name or "").rpartition(".")[2]
        if node.op_type == "Cast" and inner in ("x_float", "weight_float", "bias_float"):
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT16))
        elif inner == "epsilon":
            epsilon = np.array(node.attributes.get_float("value_float"), np.float16)
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", ir.tensor(epsilon)))
    for node in model.graph:  # the types follow
        for output in node.outputs:
            output.type = None
