"""The lowered graph is the one that `build_engine` parses, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.build_target import TensorRTVersion
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile, profiles_from_slots
from mmvision_export.core.errors import EngineError, OutputError
from mmvision_export.engine.lower import Lowered, lower
from mmvision_export.ops.domain import DOMAIN
from tests.support.command import Command
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, copy_of, relative_l2, run_graph
from tests.support.errors import refused

SIZES = [Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)]


def lowered(model: Path, output: Path, **options: Any) -> Lowered:
    defaults: dict[str, Any] = {
        "attention": "native",
        "tensorrt": TensorRTVersion("10.3"),
        "backend": "tensorrt",
        "profiles": SIZES,
    }
    return lower(model, Manifest.read(model), output, **{**defaults, **options})


@pytest.mark.parametrize("version", ["10.3", "11.1"])
def test_native_attention_computes_the_same(exported: Path, tmp_path: Path, version: str) -> None:
    written = lowered(exported, tmp_path / "x.onnx", tensorrt=TensorRTVersion(version))
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    expected = run_graph(exported / "model.onnx", pixels, rows)
    assert relative_l2(run_graph(written.graph, pixels, rows), expected) <= 2e-6
    other = batch(GRIDS["three"], HEAD_DIM_80, 1)  # the control
    assert relative_l2(run_graph(written.graph, *other), expected) > 0.01


def test_with_plugins_the_operators_stay_and_their_definitions_go(
    exported: Path, tmp_path: Path
) -> None:
    model = copy_of(exported, tmp_path / "m")
    written = lowered(model, tmp_path / "x.onnx", attention="plugin", precision="fp16")
    graph = ir.load(written.graph)
    assert not graph.functions
    assert any(node.domain == DOMAIN for node in graph.graph)
    assert "--staticPlugins=libmmvision_plugins.so" in written.command
    native = ir.load(lowered(model, tmp_path / "n.onnx", precision="fp16").graph)
    assert not any(node.domain == DOMAIN and "Attention" in node.op_type for node in native.graph)


def test_the_command_and_the_shapes(exported: Path, tmp_path: Path) -> None:
    slots = profiles_from_slots([(1, 64), (4, 64)], 2, HEAD_DIM_80)
    written = lowered(exported, tmp_path / "x.onnx", attention="uniform", profiles=slots)
    facts = json.loads(written.facts.read_text())
    assert facts["command"] == written.command
    assert [each["pixel_values"][2] for each in facts["profiles"]] == [[64, 1176], [256, 1176]]
    for words in (
        "--profile=1",
        "--maxShapes=pixel_values:256x1176,grid_thw:8x3",
        "--stronglyTyped",
    ):
        assert words in written.command
    onnx.checker.check_model(str(written.graph))


def test_tensorrt_rtx_parses_it(exported: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    written = lowered(
        exported, tmp_path / "x.onnx", tensorrt=TensorRTVersion("1.7"), backend="tensorrt-rtx"
    )
    assert written.command.startswith("tensorrt_rtx --onnx=x.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse_from_file(str(written.graph))
    assert network.num_layers > 10


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"attention": "packed"}, ["11.1", "10.3"]),
        ({"attention": "auto"}, []),
        ({"attention": "plugin"}, ["fp32"]),
        ({"attention": "plugin", "backend": "tensorrt-rtx", "precision": "fp16"}, []),
        ({"attention": "uniform"}, ["uniform"]),
    ],
)
def test_ways_that_are_not_open(
    exported: Path, tmp_path: Path, options: dict[str, Any], facts: list[str]
) -> None:
    model = copy_of(exported, tmp_path / "m")
    with refused(EngineError, *facts):
        lowered(model, tmp_path / "x.onnx", **options)
    assert not list(tmp_path.glob("x.onnx*"))


def test_the_command_line(mmvision: Command, exported: Path, tmp_path: Path) -> None:
    options = ["lower", "--model", str(exported), "--attention", "native", "--output", "x/y.onnx"]
    written = mmvision(*options, "--json")
    assert written.code == 0, written.err
    assert json.loads(written.out)["command"].startswith("trtexec --onnx=y.onnx")
    assert mmvision(*options).code == 1
    assert mmvision(*options, "--force").code == 0
    assert mmvision(*options, "--tensorrt", "new").code == 2
    inside = mmvision(*options[:-1], str(exported / "y.onnx"))
    assert "model directory" in inside.errors[0]
    with refused(OutputError, ".onnx", tmp_path / "y.txt"):
        lowered(exported, tmp_path / "y.txt")
