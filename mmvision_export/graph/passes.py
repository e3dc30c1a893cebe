"""Passes over the exported graph: names a person can read, and graphs derived from the first one.

Each pass does one thing to an `onnx_ir.Model` in place. They know the ONNX graph, not PyTorch.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
)

from mmvision_export.core.errors import ExportError

__all__ = ["inline_functions", "name_after_modules", "name_dimensions", "retype"]

_SCOPES = "pkg.torch.onnx.name_scopes"
# Module paths that every name would start with, and that tell a reader nothing.
_COMMON_PATHS = ("vision_tower.vision_model.encoder.", "vision_tower.vision_model.")


def _short(path: str) -> str:
    for prefix in _COMMON_PATHS:
        path = path.removeprefix(prefix)
    return path


def name_after_modules(model: ir.Model) -> None:
    """Name nodes, values and weights after their PyTorch module, and drop the tracer's metadata.

    A module that became one node gives it its name (`layers.3.self_attn.q_proj`); otherwise the op
    type follows (`layers.3.self_attn.VarlenAttention`, and `..._2` for the next of the kind). A
    node's output has the node's name.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    modules = [_module_of(node) for node in graph]
    nodes_in_module = Counter(modules)
    used: Counter[str] = Counter()
    for node, module in zip(graph, modules, strict=True):
        name = (
            module
            if module and nodes_in_module[module] == 1
            else ".".join(filter(None, (module, node.op_type)))
        )
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"

    for count, value in enumerate(list(graph.initializers.values())):
        # The tracer numbers the constants it makes; a parameter has its module's path for a name.
        value.name = _short(value.name or "") if "." in (value.name or "") else f"constant_{count}"
    ClearMetadataAndDocStringPass()(model)


def _module_of(node: ir.Node) -> str:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    # The last entry is the traced operation, those before it the modules around it; helpers of the
    # tracer start with _.
    paths = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return _short(paths[-1]) if paths else ""


def name_dimensions(model: ir.Model) -> None:
    """Rename the tracer's symbols (`s77`) to `num_patches` and its like, in every shape."""
    pixel_values, grid_thw = model.graph.inputs
    (image_embeds,) = model.graph.outputs
    assert (
        pixel_values.shape and grid_thw.shape and image_embeds.shape
    )  # the tracer gives every value a shape
    patches, images, tokens = (
        str(pixel_values.shape[0]),
        str(grid_thw.shape[0]),
        str(image_embeds.shape[0]),
    )

    def renamed(dimension: str) -> str:
        if tokens != patches and dimension in (tokens, tokens.strip("()")):
            return "num_image_tokens"
        return re.sub(
            rf"\b{images}\b", "num_images", re.sub(rf"\b{patches}\b", "num_patches", dimension)
        )

    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) or d.value is None else renamed(d.value)
                    for d in value.shape
                ]
            )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def retype(model: ir.Model, dtype: ir.DataType) -> None:
    """Turn a float32 graph into one of another type, with float32 where that loses accuracy.

    What depends on pixels changes its type: both ends of the graph, the hidden states and the
    weights. What depends on `grid_thw` alone, the rotary angles and their cos and sin, stays
    float32, and so does what an operator keeps in float32 inside it: the statistics of
    LayerNormalization (`stash_type`), the rotation, the softmax. No Cast is added. The result is
    the graph that tracing the encoder in that type gives.

    Args:
        model: A float32 graph; changed in place. Weights are converted when they are read, one at a
            time.
        dtype: FLOAT16.

    Raises:
        ExportError: The graph is not float32, or a weight is not finite in the new type.
    """
    graph = model.graph
    pixel_values = graph.inputs[0]
    if pixel_values.dtype != ir.DataType.FLOAT:
        raise ExportError(
            f"only a float32 graph can be retyped, this one takes {pixel_values.dtype}"
        )

    reached = {pixel_values}
    for node in graph:  # in topological order
        if any(value in reached for value in node.inputs):
            reached |= {output for output in node.outputs if output.dtype == ir.DataType.FLOAT}
    # A new type object each: copies of a model share theirs.
    for value in reached:
        value.type = ir.TensorType(dtype)

    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if value.dtype != ir.DataType.FLOAT or not any(
            out in reached for node, _ in uses for out in node.outputs
        ):
            continue
        if not all(out in reached for node, _ in uses for out in node.outputs):
            raise ExportError(
                f"initializer {value.name} is used both by pixels and by geometry, so it has no single type"
            )
        assert value.const_value is not None
        value.const_value = _retyped(value.const_value, value.name or "", dtype)
        value.type = ir.TensorType(dtype)


def _retyped(tensor: ir.TensorProtocol, name: str, dtype: ir.DataType) -> ir.LazyTensor:
    def convert() -> ir.TensorProtocol:
        array = tensor.numpy()
        with np.errstate(over="ignore"):
            converted = array.astype(dtype.numpy())
        if not np.isfinite(converted).all():
            largest = float(np.abs(array).max())
            raise ExportError(
                f"weight {name} is not finite in {dtype.name.lower()}: its largest magnitude is {largest:g}",
                hint="export with --bf16, whose range is float32's",
            )
        return ir.tensor(converted)

    return ir.LazyTensor(convert, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def inline_functions(model: ir.Model) -> None:
    """Replace each node that has a definition in the model by that definition.

    A node keeps the name of the op it came from (`layers.3.self_attn.VarlenAttention.mask`), so
    that a builder's log or a profiler's table says which layer it belongs to; what is equal in
    every layer, such as the attention mask, is computed once.
    """
    calls = "mmvision.call"
    # The inliner hands a call's metadata down to the nodes it makes, and renames them so that all
    # differ. Putting the call's name in front afterwards needs the names as they stand in the
    # functions.
    inner_names = "mmvision.inner_name"
    for node in model.graph:
        if node.op_identifier() in model.functions:
            node.metadata_props[calls] = node.name or ""
    inlined = {function.domain for function in model.functions.values()}
    for function in model.functions.values():
        for node in function:
            node.metadata_props[inner_names] = node.outputs[0].name or ""
    InlinePass()(model)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        call, inner = (
            node.metadata_props.pop(calls, None),
            node.metadata_props.pop(inner_names, None),
        )
        if call is not None and inner is not None:
            node.name = f"{call}.{inner}"
            if node.outputs[0] not in outputs:
                node.outputs[0].name = node.name
    _measure_patches_once(model.graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    for domain in inlined - {node.domain for node in model.graph}:
        model.opset_imports.pop(domain, None)


def _measure_patches_once(graph: ir.Graph) -> None:
    """Read the number of patches off the graph's input rather than off each layer's q.

    It is the same number, but what is computed from it, the attention mask above all, only becomes
    one common subexpression if it is the same tensor's.
    """
    pixel_values = graph.inputs[0]
    assert pixel_values.shape is not None  # name_dimensions has named its first dimension
    for node in graph:
        measured = node.inputs[0] if node.op_type == "Shape" else None
        if measured is None or measured.shape is None or measured.shape[0] != pixel_values.shape[0]:
            continue
        if node.attributes.get_int("start", 0) == 0 and node.attributes.get_int("end", 0) == 1:
            node.replace_input_with(0, pixel_values)
