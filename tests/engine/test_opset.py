"""A graph declared as one of an earlier opset."""

from __future__ import annotations

import onnx
import onnx.defs
import onnx_ir as ir
import pytest

from mmvision_export.core.errors import EngineError
from mmvision_export.engine.opset import _ONLY_WIDENED, retarget
from tests.support.lowered import model_from_text

GELU = """<ir_version: 10, opset_import: ["": 23]>
g (float[n] x) => (float[n] y) { y = Gelu (x) }"""


def test_to_the_latest_that_the_parser_knows() -> None:
    model = model_from_text(GELU)
    retarget(model, 20)
    assert model.opset_imports[""] == 20
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    retarget(model, 24)  # never upwards
    assert model.opset_imports[""] == 20


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[n] x) => (float[n] y) { y = Swish (x) }", "Swish"),  # of opset 24
        (
            "(float[2, 3, 4, 8] x) => (float[2, 3, 4, 8] y) { y = Attention (x, x, x) }",
            "Attention",
        ),
        ("(float[n] x, float s) => (y) { y = QuantizeLinear <output_dtype: int = 3> (x, s) }",
         "output_dtype"),
        ("(float4e2m1[n] x) => (y) { y = Identity (x) }", "FLOAT4E2M1"),
        ("(float[n] x) => (y) { y = TopK <k: int = 1> (x) }", "TopK"),
    ],
)  # fmt: skip
def test_what_means_something_else_there_is_refused(text: str, reason: str) -> None:
    opset = 24 if reason in ("Swish", "TopK") else 23
    model = ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}]> g {text}')
    )
    with pytest.raises(EngineError) as caught:
        retarget(model, 20)
    assert reason in str(caught.value)
    assert model.opset_imports[""] == opset


@pytest.mark.parametrize("op_type", sorted(_ONLY_WIDENED))
def test_the_listed_operators_differ_in_types_and_attributes_alone(op_type: str) -> None:
    """Same inputs and outputs by name, and no attribute of the earlier version gone or retyped."""
    then, now = (onnx.defs.get_schema(op_type, opset) for opset in (20, 24))
    assert [p.name for p in then.inputs] == [p.name for p in now.inputs]
    assert [p.name for p in then.outputs] == [p.name for p in now.outputs]
    for name, attribute in then.attributes.items():
        assert now.attributes[name].type == attribute.type
        assert now.attributes[name].default_value == attribute.default_value
    for before, after in zip(
        [*then.inputs, *then.outputs], [*now.inputs, *now.outputs], strict=True
    ):
        assert before.types <= after.types
