"""The graph as exported, against the table of what each TensorRT's parser makes of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.build_target import Installation, TensorRTName, TensorRTVersion
from mmvision_export.engine.parser_findings import Rule, parser_findings
from mmvision_export.engine.parser_support import (
    ParserVersion,
    latest_opset,
    operator_row,
    parser_version,
)
from mmvision_export.graph.passes import inline_functions, retype
from mmvision_export.ops.registry import attach_functions
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION, AttentionBody
from tests.support.configs import HEAD_DIM_80

LAYER_NORMS = 2 * HEAD_DIM_80.num_hidden_layers + 1


def graph_as_exported(
    exported: Path, body: AttentionBody, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Model:
    """The definitions in the place of the nodes, and nothing done for the parser."""
    model = ir.load(exported / "model.onnx")
    if dtype != ir.DataType.FLOAT:
        retype(model, dtype)
    attach_functions(model, bodies={VARLEN_ATTENTION.name: body})
    inline_functions(model)
    return model


def found(model: ir.Model, parser: ParserVersion) -> set[tuple[str, Rule]]:
    return {(finding.op_type, finding.rule) for finding in parser_findings(model, parser)}


@pytest.mark.parametrize(
    ("backend", "version", "parser", "opset"),
    [
        ("tensorrt", "10.3.0.30", (10, 3), 20),
        ("tensorrt", "10.13.3.9", (10, 13), 22),
        ("tensorrt", "10.14.1.48", (10, 14), 24),
        ("tensorrt", "11.1.0.10", (11, 1), 24),
        ("tensorrt-rtx", "1.7.1.116", (11, 1), 24),
    ],
)
def test_whose_parser(
    backend: TensorRTName, version: str, parser: ParserVersion, opset: int
) -> None:
    installation = Installation(
        backend=backend, tensorrt_version=TensorRTVersion(version), platform="linux-x86_64"
    )
    assert parser_version(installation) == parser
    assert latest_opset(parser) == opset


def test_a_row_holds_until_the_next_one() -> None:
    rows = [operator_row("", "CumSum", (10, minor)) for minor in (0, 7, 8, 16)]
    assert [row and row.imported_as for row in rows] == ["loop", "loop", "layers", "layers"]
    assert operator_row("", "Attention", (10, 13)) is None
    assert operator_row("", "Attention", (10, 14)) is not None
    assert operator_row("com.microsoft", "Gelu", (11, 1)) is None


def test_the_exported_graph_makes_a_loop_before_10_8(exported: Path) -> None:
    model = graph_as_exported(exported, "matmul")
    assert ("CumSum", "loop") in found(model, (10, 3))
    # From then on it is one layer, which is documented for floats only; ours adds integers.
    assert found(model, (10, 8)) == {("", "opset"), ("CumSum", "type")}


def test_the_exported_layer_norms_are_refused_or_lose_their_statistics(exported: Path) -> None:
    half = graph_as_exported(exported, "matmul", ir.DataType.FLOAT16)
    assert ("LayerNormalization", "rejected call") in found(half, (10, 3))
    for parser in ((10, 6), (10, 16), (11, 1)):
        findings = [f for f in parser_findings(half, parser) if f.rule == "statistics"]
        assert len(findings) == LAYER_NORMS
        assert {finding.op_type for finding in findings} == {"LayerNormalization"}
    # float32 has nothing to lose, once the call is not made any more.
    single = graph_as_exported(exported, "matmul")
    assert ("LayerNormalization", "rejected call") in found(single, (10, 5))
    assert not any(op_type == "LayerNormalization" for op_type, _ in found(single, (10, 6)))


def test_the_exported_opset_and_attention_are_later_than_jetpacks_parsers(exported: Path) -> None:
    model = graph_as_exported(exported, "attention")
    for parser in ((10, 3), (10, 13)):
        assert found(model, parser) >= {("", "opset"), ("Attention", "unknown operator")}
    assert not found(model, (10, 14)) & {("", "opset"), ("Attention", "unknown operator")}


def test_packed_attention_is_another_operator_on_11_0(exported: Path) -> None:
    model = graph_as_exported(exported, "packed", ir.DataType.FLOAT16)
    assert ("TRT_Attention", "unknown operator") in found(model, (10, 16))
    assert ("TRT_Attention", "undecided") in found(model, (11, 0))
    assert ("TRT_Attention", "undecided") not in found(model, (11, 1))


@pytest.mark.parametrize("order", ["same", "shifted", "absent"])
def test_packed_attention_wants_two_length_tensors_in_their_places(
    order: str, exported: Path
) -> None:
    model = graph_as_exported(exported, "packed", ir.DataType.FLOAT16)
    for node in [node for node in model.graph if node.op_type == "TRT_Attention"]:
        lengths = node.inputs[4]
        node.resize_inputs(8 if order == "shifted" else 6)
        node.replace_input_with(4, lengths if order == "same" else None)
        node.replace_input_with(5, lengths if order == "same" else None)
        if order == "shifted":  # as documented for 11.0
            node.replace_input_with(6, lengths)
            node.replace_input_with(7, lengths)
    assert ("TRT_Attention", "packed lengths") in found(model, (11, 1))


def small_graph(op_type: str, *types: ir.DataType, domain: str = "") -> ir.Model:
    """One node of an operator, with an input of each type."""
    inputs = [
        ir.Value(name=f"x{index}", type=ir.TensorType(dtype), shape=ir.Shape([4]))
        for index, dtype in enumerate(types)
    ]
    node = ir.node(op_type, inputs, domain=domain, name="the node")
    node.outputs[0].name = "y"
    opsets = {"": 20, **({domain: 1} if domain else {})}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opsets, name="small")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (small_graph("NonZero", ir.DataType.FLOAT), "data-dependent shape"),
        (small_graph("Loop", ir.DataType.INT64, ir.DataType.BOOL), "loop"),
        (small_graph("Scan", ir.DataType.FLOAT), "loop"),
        (small_graph("If", ir.DataType.BOOL), "conditional"),
        (small_graph("Cos", ir.DataType.INT32), "type"),
        (small_graph("SequenceInsert", ir.DataType.FLOAT), "unknown operator"),
        (
            small_graph("VarlenAttention", ir.DataType.FLOAT16, domain="mmvision"),
            "unknown operator",
        ),
    ],
)
def test_each_rule_finds_what_breaks_it(model: ir.Model, rule: Rule) -> None:
    for parser in ((10, 3), (10, 14), (11, 1)):
        assert rule in {finding.rule for finding in parser_findings(model, parser)}


def test_a_node_in_a_subgraph_is_seen() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    outer (bool c, float[4] x) => (y) {
        y = If (c) <then_branch = then () => (a) { a = NonZero (x) },
                    else_branch = other () => (b) { b = Shape (x) }>
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rules = {finding.rule for finding in parser_findings(model, (11, 1))}
    assert rules == {"conditional", "data-dependent shape"}


def test_a_plugin_is_known_where_its_library_goes_along() -> None:
    model = small_graph("VarlenAttention", ir.DataType.FLOAT16, domain="mmvision")
    assert parser_findings(model, (10, 3), plugins={"mmvision::VarlenAttention"}) == []
