"""One op's ONNX definition alone in a graph, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import TensorProto, helper

SHAPES: dict[str, list[str]] = {
    **{key: ["N", "heads", "head_dim"] for key in "qkv"},
    **{key: ["N", "half"] for key in ("cos", "sin")},
    "cu_seqlens": ["bounds"],
}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def session_of_function(
    function: onnx.FunctionProto, dtype: str, scale: float | None = None
) -> onnxruntime.InferenceSession:
    """A graph of one node that calls the function."""
    float_inputs = {name: TYPES[dtype] for name in function.input if name in ("q", "k", "v")}
    others = {"cu_seqlens": TensorProto.INT32, "cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT}
    types = {name: float_inputs.get(name, others.get(name, 0)) for name in function.input}
    node = helper.make_node(function.name, function.input, function.output, domain="mmvision")
    if scale is not None:
        node.attribute.append(helper.make_attribute("scale", scale))
    graph = helper.make_graph(
        [node],
        "one_call",
        [helper.make_tensor_value_info(name, kind, SHAPES[name]) for name, kind in types.items()],
        [
            helper.make_tensor_value_info(name, TYPES[dtype], SHAPES["q"])
            for name in function.output
        ],
    )
    opset = function.opset_import[0].version
    model = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("mmvision", 1)],
    )
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def random_qkv(n: int, heads: int, head_dim: int, dtype: str) -> dict[str, Any]:
    """q, k and v of n patches, normal random, seeded by n."""
    values = np.random.default_rng(n).standard_normal((3, n, heads, head_dim)).astype(dtype)
    return dict(zip("qkv", values, strict=True))


def with_expanded_mask(function: onnx.FunctionProto) -> onnx.FunctionProto:
    """A body with ONNX `Attention` over slots as ONNX Runtime's CPU provider runs it.

    Its kernel takes no mask `[S, 1, 1, L]`, which the standard and TensorRT broadcast, but `[S, 1, L, L]`.
    """
    changed = onnx.FunctionProto()
    changed.CopyFrom(function)
    attention = next((node for node in changed.node if node.op_type == "Attention"), None)
    if attention is None or len(attention.input) < 4:
        return changed
    expanded = [
        helper.make_node(
            "Concat",
            ["num_slots", "one_int64", "slot_patches", "slot_patches"],
            ["expanded_shape"],
            axis=0,
        ),
        helper.make_node("Expand", [attention.input[3], "expanded_shape"], ["expanded_mask"]),
    ]
    attention.input[3] = "expanded_mask"
    at = list(changed.node).index(attention)
    nodes = [*changed.node[:at], *expanded, *changed.node[at:]]
    del changed.node[:]
    changed.node.extend(nodes)
    return changed
