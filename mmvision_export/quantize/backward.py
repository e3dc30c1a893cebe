"""How a change inside a graph reaches its output: vector-Jacobian products, in NumPy.

ONNX Runtime gives the values of one run; this walks the same graph from its output to its input. It
needs neither the checkpoint nor PyTorch, so that a Jetson ranks units too.

A cotangent is the gradient of a scalar with respect to a tensor. Several scalars go through the
graph at a time: every array here has them as its first axis, `[K, ...]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mmvision_export.core.errors import QuantizationError

__all__ = ["pulled_back", "values_needed"]

Array = npt.NDArray[np.float32]
_Values = Mapping[str, npt.NDArray[np.generic]]


def values_needed(model: ir.Model) -> list[str]:
    """Names of the tensors whose values `pulled_back` reads, in the graph's order."""
    names: dict[str, None] = {}
    for node in model.graph:
        for index in _READS.get(node.op_type, ()):
            names[_name(node.inputs[index])] = None
        if node.op_type == "Gelu":
            names[_name(node.outputs[0])] = None
    return list(names)


def pulled_back(
    model: ir.Model, values: _Values, cotangents: Array
) -> Iterator[tuple[ir.Node, Array, Array]]:
    """Every product with constant weights, the last first, and the cotangents around it.

    Args:
        model: The portable graph.
        values: Of the tensors that `values_needed` names, in one run.
        cotangents: Of the graph's output, `[K, tokens, channels]` float32.

    Yields:
        The node, and the cotangents of its output and of its input, `[K, N, out]` and `[K, N, in]`.

    Raises:
        QuantizationError: The graph has an operator between its products that this does not know.
    """
    pending: dict[str, Array] = {_name(model.graph.outputs[0]): cotangents}
    # What no product makes, such as rotary angles, is the same in the quantised graph.
    movable = _moved_by_products(model)
    for node in reversed(list(model.graph)):
        given = [pending.pop(_name(value), None) for value in node.outputs]
        if all(each is None for each in given):
            continue
        targets = [
            index
            for index, value in enumerate(node.inputs)
            if value is not None and value.name in movable
        ]
        is_product = node.op_type == "Gemm"
        if not targets and not is_product:
            continue
        rule = _RULES.get(node.op_type)
        if rule is None:
            raise QuantizationError(
                f"{node.name}: units cannot be ranked through the operator {node.op_type}",
                hint="export the model again",
            )
        found = rule(node, values, given)
        if is_product:
            assert given[0] is not None
            yield node, given[0], found[0]
        for index, cotangent in found.items():
            if index in targets:
                name = _name(node.inputs[index])
                pending[name] = pending[name] + cotangent if name in pending else cotangent


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def _floats(values: _Values, value: ir.Value | None) -> Array:
    return values[_name(value)].astype(np.float32, copy=False)


def _moved_by_products(model: ir.Model) -> set[str]:
    moved: set[str] = set()
    for node in model.graph:
        if node.op_type == "Gemm" or any(v is not None and v.name in moved for v in node.inputs):
            moved |= {_name(value) for value in node.outputs}
    return moved


_Given = list[Array | None]
_Rule = Callable[[ir.Node, _Values, _Given], dict[int, Array]]


def _gemm(node: ir.Node, _: _Values, given: _Given) -> dict[int, Array]:
    weight, (cotangent,) = node.inputs[1], given
    assert weight is not None and weight.const_value is not None and cotangent is not None
    # [K * N, out] @ [out, in]
    rows = cotangent.reshape(-1, cotangent.shape[-1]) @ weight.const_value.numpy()
    return {0: rows.reshape(*cotangent.shape[:-1], -1)}


def _layer_norm(node: ir.Node, values: _Values, given: _Given) -> dict[int, Array]:
    x, (cotangent,) = _floats(values, node.inputs[0]), given
    gain = node.inputs[1]
    assert gain is not None and gain.const_value is not None and cotangent is not None
    epsilon = node.attributes["epsilon"].as_float()
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    unit = centred * inverse
    g = cotangent * gain.const_value.numpy()
    g -= g.mean(axis=-1, keepdims=True) + unit * (g * unit).mean(axis=-1, keepdims=True)
    return {0: g * inverse}


def _gelu(node: ir.Node, values: _Values, given: _Given) -> dict[int, Array]:
    x, y = _floats(values, node.inputs[0]), _floats(values, node.outputs[0])
    (cotangent,) = given
    assert cotangent is not None
    density = np.exp(-(x**2) / 2) / np.float32(np.sqrt(2 * np.pi))
    # y = x * Phi(x), so that Phi needs no error function; near 0 it is its tangent.
    near = np.abs(x) < 1e-2
    phi = np.where(near, 0.5 + x * density, y / np.where(near, 1, x))
    return {0: cotangent * (phi + x * density)}


def _add(_: ir.Node, __: _Values, given: _Given) -> dict[int, Array]:
    assert given[0] is not None
    return {0: given[0], 1: given[0]}


def _reshape(node: ir.Node, _: _Values, given: _Given) -> dict[int, Array]:
    source, (cotangent,) = node.inputs[0], given
    assert source is not None and source.shape is not None and cotangent is not None
    # The first axis is patches or tokens; the others are known.
    known = [int(size) for size in source.shape[1:]]  # type: ignore[arg-type]
    return {0: cotangent.reshape(len(cotangent), -1, *known)}


def _rotary(node: ir.Node, values: _Values, given: _Given) -> dict[int, Array]:
    cos, sin = (_floats(values, value)[:, None] for value in node.inputs[2:4])
    half = cos.shape[-1]

    def turned_back(g: Array) -> Array:
        first, second = g[..., :half], g[..., half : 2 * half]
        turned = [first * cos + second * sin, second * cos - first * sin, g[..., 2 * half :]]
        return np.concatenate(turned, axis=-1)

    return {index: turned_back(g) for index, g in enumerate(given) if g is not None}


def _attention(node: ir.Node, values: _Values, given: _Given) -> dict[int, Array]:
    q, k, v = (
        _floats(values, value).swapaxes(0, 1) for value in node.inputs[:3]
    )  # [heads, N, head_dim]
    bounds = values[_name(node.inputs[3])].tolist()
    scale = np.float32(node.attributes["scale"].as_float())
    (cotangent,) = given
    assert cotangent is not None
    g = cotangent.swapaxes(1, 2)  # [K, heads, N, head_dim]
    gq, gk, gv = (np.zeros_like(g) for _ in range(3))
    for start, end in itertools.pairwise(bounds):
        rows = slice(start, end)
        for head in range(len(q)):  # one head's scores at a time
            a, b, c = q[head, rows], k[head, rows], v[head, rows]
            scores = scale * (a @ b.T)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            go = g[:, head, rows]  # [K, n, head_dim]
            count, n, size = go.shape
            # Products of few large matrices, rather than of many small ones.
            beside = weights.T @ go.swapaxes(0, 1).reshape(n, count * size)
            gv[:, head, rows] = beside.reshape(n, count, size).swapaxes(0, 1)
            gw = (go.reshape(count * n, size) @ c.T).reshape(count, n, n)
            gs = weights * (gw - (gw * weights).sum(axis=-1, keepdims=True)) * scale
            gq[:, head, rows] = (gs.reshape(count * n, n) @ b).reshape(go.shape)
            turned = np.ascontiguousarray(gs.swapaxes(1, 2)).reshape(count * n, n)
            gk[:, head, rows] = (turned @ a).reshape(go.shape)
    return {index: each.swapaxes(1, 2) for index, each in enumerate((gq, gk, gv))}


_RULES: dict[str, _Rule] = {
    "Add": _add,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "QKRotaryEmbedding": _rotary,
    "Reshape": _reshape,
    "VarlenAttention": _attention,
}
_READS = {
    "Gelu": (0,),
    "Gemm": (0,),  # for whoever wants to know what the product reads
    "LayerNormalization": (0,),
    "QKRotaryEmbedding": (2, 3),
    "VarlenAttention": (0, 1, 2, 3),
}
