"""What a TensorRT's parser would refuse in a graph, or turn into what an engine should not hold.

The table in `parser_support` is read for each node. That needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mmvision_export.engine.parser_support import (
    ImportedAs,
    OperatorRow,
    ParserVersion,
    latest_opset,
    operator_row,
)

__all__ = ["Finding", "Rule", "parser_findings"]

Rule = (
    ImportedAs
    | Literal[
        "opset",  # later than the parser is documented for
        "unknown operator",  # neither in the table nor a plugin that goes with the engine
        "type",  # an operand's type is not among those of the table, or cannot be told
        "statistics",  # a normalisation's statistics would not be float32
        "packed lengths",  # not the inputs that `TRT_Attention` takes
    ]
)

# `TRT_Attention` of TensorRT 11.1: q, k, v, mask, query lengths, key and value lengths.
_LENGTHS = (4, 5)
_PACKED_ATTRIBUTES = {"query_form", "kv_form", "causal_kind", "TRT_decomposable"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        node: Name of the node, or `model`.
        op_type: Its operator.
        rule: The rule it breaks.
        detail: The value, for people.
    """

    node: str
    op_type: str
    rule: Rule
    detail: str


def parser_findings(
    model: ir.Model, parser: ParserVersion, *, plugins: Collection[str] = ()
) -> list[Finding]:
    """Walk a lowered graph, its subgraphs too.

    Args:
        model: The graph as the parser shall see it; it gets the types that can be inferred.
        parser: The TensorRT whose parser it is.
        plugins: Operators, as `domain::op_type`, of the plugin library that goes with the engine.

    Returns:
        What was found, in the order of the nodes; nothing if the parser takes the graph as layers.
    """
    ShapeInferencePass()(model)
    findings = []
    opset, latest = model.opset_imports[""], latest_opset(parser)
    if opset > latest:
        findings.append(Finding("model", "", "opset", f"{opset}, documented to {latest}"))
    for node in model.graph.all_nodes():
        if f"{node.domain}::{node.op_type}" in plugins:
            continue
        row = operator_row(node.domain, node.op_type, parser)
        findings += [
            Finding(node.name or "", node.op_type, rule, text)
            for rule, text in _broken_by(node, row)
        ]
    return findings


def _broken_by(node: ir.Node, row: OperatorRow | None) -> Iterator[tuple[Rule, str]]:
    if row is None:
        yield "unknown operator", f"{node.domain or 'ai.onnx'}::{node.op_type}"
        return
    if row.imported_as != "layers":
        yield row.imported_as, row.source
    operands = [node.inputs[index] for index in row.operands if index < len(node.inputs)]
    types = [value.dtype for value in operands if value is not None]
    for dtype in types:
        if dtype not in row.types:
            yield "type", str(dtype)
    if not row.keeps_stash_type and any(dtype != ir.DataType.FLOAT for dtype in types):
        yield "statistics", f"of {types[0]}"
    if node.op_type == "TRT_Attention":
        yield from _packed_lengths(node)


def _packed_lengths(node: ir.Node) -> Iterator[tuple[Rule, str]]:
    lengths = [node.inputs[index] if index < len(node.inputs) else None for index in _LENGTHS]
    if len(node.inputs) > _LENGTHS[-1] + 1 or any(value is None for value in lengths):
        yield "packed lengths", f"not at inputs {_LENGTHS} of {len(node.inputs)}"
    elif lengths[0] is lengths[1]:
        yield "packed lengths", "one tensor for the queries and the keys"
    elif any(value is not None and value.dtype != ir.DataType.INT32 for value in lengths):
        yield "packed lengths", "not int32"
    if unknown := set(node.attributes) - _PACKED_ATTRIBUTES:
        yield "packed lengths", f"attributes that it ignores: {', '.join(sorted(unknown))}"
