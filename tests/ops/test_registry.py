"""Every registered op is whole, and has one name everywhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from mmvision_export.ops import registry
from mmvision_export.ops.definition import OpDefinition
from mmvision_export.ops.domain import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES
from mmvision_export.ops.registry import OPS, attach_functions, translation_table
from mmvision_export.ops.varlen_attention.onnx_op import VARLEN_ATTENTION, attention_body_of

ROOT = Path(__file__).parents[2]
FOLDER = Path(registry.__file__).parent

HEADS = torch.zeros(8, 2, 16)
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "VarlenAttention": (HEADS, HEADS, HEADS, torch.tensor([0, 8], dtype=torch.int32), 0.25),
    "QKRotaryEmbedding": (HEADS, HEADS, torch.zeros(8, 6), torch.zeros(8, 6)),
}


def snake_case(name: str) -> str:
    """`QKRotaryEmbedding` -> `qk_rotary_embedding`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


every_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


class Call(torch.nn.Module):
    """A module of one call of an op."""

    def __init__(self, op: OpDefinition, scalars: tuple[float, ...]) -> None:
        super().__init__()
        self.call = getattr(torch.ops.mmvision, op.name).default
        self.scalars = scalars

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors, *self.scalars)


@every_op
def test_one_name_everywhere(op: OpDefinition) -> None:
    folder = snake_case(op.name)
    assert op.torch_module == f"mmvision_export.ops.{folder}.torch_op"
    assert (FOLDER / folder / "onnx_op.py").is_file()
    side = importlib.import_module(op.torch_module)
    assert side.TORCH_OP.name() == f"{DOMAIN}::{op.name}"
    assert callable(getattr(side, folder))  # the function that PyTorch calls
    plugin = ROOT / "plugins" / folder
    assert (plugin / "kernel.py").is_file()
    assert f'"{op.name}"' in (plugin / f"{folder}.h").read_text(encoding="utf-8")


@every_op
def test_the_torch_op_and_the_schema_agree(op: OpDefinition) -> None:
    signature = getattr(torch.ops.mmvision, op.name).default._schema
    assert [argument.name for argument in signature.arguments] == [*op.inputs, *op.attributes]
    assert len(signature.returns) == len(op.outputs)
    assert (op.schema.name, op.schema.domain) == (op.name, DOMAIN)
    assert op.schema.since_version == OP_VERSION
    assert set(op.schema.attributes) == {*op.attributes, *PLUGIN_ATTRIBUTES}


@every_op
def test_its_node_exports_with_a_definition(op: OpDefinition) -> None:
    example = EXAMPLES[op.name]
    tensors = tuple(value for value in example if isinstance(value, torch.Tensor))
    scalars = tuple(value for value in example if not isinstance(value, torch.Tensor))
    program = torch.onnx.export(
        Call(op, scalars).eval(),
        tensors,
        dynamo=True,
        opset_version=23,
        custom_translation_table=translation_table(),
        verbose=False,
    )
    assert program is not None
    (node,) = [node for node in program.model.graph if node.domain == DOMAIN]
    assert node.op_type == op.name
    assert (len(node.inputs), len(node.outputs)) == (len(op.inputs), len(op.outputs))
    assert set(node.attributes) == {*op.attributes, *PLUGIN_ATTRIBUTES}
    attach_functions(program.model)
    assert (DOMAIN, op.name, "") in program.model.functions


def test_no_op_is_left_out() -> None:
    """What lies in the folders and what is registered is the same; so a forgotten row is seen."""
    folders = {path.parent.name for path in FOLDER.glob("*/onnx_op.py")}
    assert folders == {snake_case(name) for name in OPS}
    plugins = {path.parent.name for path in (ROOT / "plugins").glob("*/kernel.py")}
    assert plugins <= folders
    assert set(EXAMPLES) == set(OPS)


@pytest.mark.parametrize(
    "body", [name for name, body in VARLEN_ATTENTION.bodies.items() if body.portable]
)
def test_a_body_can_be_chosen(body: str) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    attach_functions(model, bodies={VARLEN_ATTENTION.name: body})
    assert attention_body_of(model) == body
    assert {name for _, name, _ in model.functions} == set(OPS)


def test_reading_the_registry_loads_no_torch() -> None:
    code = (
        "import sys, mmvision_export.ops.registry;"
        "sys.exit(bool({'torch', 'onnxscript'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
