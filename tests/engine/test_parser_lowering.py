"""Every graph that a TensorRT's parser gets has nothing that the table of that parser warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mmvision_export.artifacts.build_target import Installation, TensorRTName, TensorRTVersion
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.engine.attention import Lowering, lowered_model
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.parser_findings import Finding, parser_findings
from mmvision_export.engine.parser_support import parser_version
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.ops.varlen_attention.onnx_op import AttentionBody
from mmvision_export.quantize.quantize import quantize
from tests.support.configs import HEAD_DIM_80, copy_of, relative_l2
from tests.support.faults import statistics_in_float16
from tests.support.lowered import run_as_written, run_model

PLUGINS = ("mmvision::VarlenAttention", "mmvision::QKRotaryEmbedding")
GRID = ((1, 6, 8), (1, 2, 2), (2, 4, 2))

PRODUCTS: tuple[AttentionBody, ...] = ("matmul", "uniform_matmul", "equal_matmul")
FUSED: tuple[AttentionBody, ...] = ("attention", "uniform_attention", "equal_attention")
TENSORRTS: tuple[tuple[TensorRTName, str, tuple[AttentionBody | None, ...]], ...] = (
    ("tensorrt", "10.3.0.30", (None, *PRODUCTS)),
    ("tensorrt", "10.8.0.43", (None, *PRODUCTS)),
    ("tensorrt", "10.13.3.9", (None, *PRODUCTS)),
    ("tensorrt", "10.14.1.48", (None, *PRODUCTS, *FUSED)),
    ("tensorrt", "10.16.0.72", (None, *PRODUCTS, *FUSED)),
    ("tensorrt", "11.0.0.114", (None, *PRODUCTS, *FUSED)),
    ("tensorrt", "11.1.0.10", (None, *PRODUCTS, *FUSED, "packed")),
    ("tensorrt-rtx", "1.7.1.116", (*PRODUCTS, *FUSED, "packed")),
)


@pytest.fixture(scope="module")
def graphs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A graph of each precision, and the float32 graph of the lowest opset."""
    folder = tmp_path_factory.mktemp("precisions")
    directory = copy_of(exported, folder / "m")
    derive_fp16(directory, Manifest.read(directory), check=False)
    batches = [sample_batch(GRID, HEAD_DIM_80, seed=seed) for seed in (0, 1)]
    for flavour in ("int8", "fp8"):
        quantize(
            directory,
            Manifest.read(directory),
            flavour,
            calibration=batches[:1],
            held_out=batches[1:],
        )
    source = WeightSource(random_config=HEAD_DIM_80, seed=1)
    export_model_directory(source, folder / "bf16", precision="bf16")
    export_model_directory(source, folder / "18", opset=18)
    return {
        "fp32": directory / "model.onnx",
        "fp16": directory / "model.fp16.onnx",
        "bf16": folder / "bf16" / "model.onnx",
        "int8": directory / "model.int8.onnx",
        "fp8": directory / "model.fp8.onnx",
        "opset 18": folder / "18" / "model.onnx",
    }


@pytest.mark.parametrize(
    ("backend", "version", "body"),
    [(backend, version, body) for backend, version, bodies in TENSORRTS for body in bodies],
)
def test_nothing_is_found_in_what_a_parser_gets(
    backend: TensorRTName, version: str, body: AttentionBody | None, graphs: dict[str, Path]
) -> None:
    parser = parser_version(
        Installation(
            backend=backend, tensorrt_version=TensorRTVersion(version), platform="linux-x86_64"
        )
    )
    findings: dict[str, list[Finding]] = {}
    for name, graph in graphs.items():
        if body in FUSED and name == "opset 18":
            continue  # which has no Attention
        if body in (None, "packed") and name in ("fp32", "opset 18"):
            continue  # whose kernels are for float16 and bfloat16
        model = lowered_model(graph, Lowering(body), parser)
        findings[name] = parser_findings(model, parser, plugins=PLUGINS if body is None else ())
    assert len(findings) >= 4
    assert not any(findings.values()), findings


def with_four_slots_of_64(model: ir.Model, rows: int) -> ir.Model:
    """A lowered graph whose every shape is a constant."""
    pixel_values, grid_thw = model.graph.inputs
    pixel_values.shape = ir.Shape([256, HEAD_DIM_80.patch_dim])
    grid_thw.shape = ir.Shape([4 * rows, 3])
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    return model


@pytest.mark.parametrize("parser", [(10, 3), (11, 1)])
@pytest.mark.parametrize(("body", "rows"), [("uniform_matmul", 2), ("equal_matmul", 1)])
def test_nothing_is_found_in_slots_of_one_size(
    body: AttentionBody, rows: int, parser: tuple[int, int], graphs: dict[str, Path]
) -> None:
    model = with_four_slots_of_64(lowered_model(graphs["fp16"], Lowering(body), parser), rows)
    assert parser_findings(model, parser) == []


@pytest.mark.parametrize(
    ("body", "rows", "mask"),
    [("uniform_attention", 2, [(4, 1, 1, 64)]), ("equal_attention", 1, [])],
)
def test_slots_are_constant_shapes_to_tensorrt_rtx(
    body: AttentionBody, rows: int, mask: list[tuple[int, ...]], graphs: dict[str, Path]
) -> None:
    """Which depend on shapes alone, and on no value that the device holds."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    lowered = lowered_model(graphs["fp16"], Lowering(body), (11, 1))
    model = ir.to_proto(with_four_slots_of_64(lowered, rows))
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString(), str(graphs["fp16"])), parser.get_error(0).desc()
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attention = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(attention) == HEAD_DIM_80.num_hidden_layers
    for layer in attention:
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        shapes = [tuple(tensor.shape) for tensor in inputs if tensor is not None]
        assert shapes == [(4, 2, 64, 80)] * 3 + mask


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_the_graph_for_jetpack_6_is_valid_in_the_opset_it_declares(
    name: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    model = lowered_model(graphs[name], Lowering("matmul"), (10, 3))
    assert model.opset_imports == {"": 20}
    path = graphs[name].parent / "lowered.onnx"  # where its weights are
    path.write_bytes(ir.to_proto(model).SerializeToString())
    try:
        onnx.checker.check_model(path, full_check=True)
    finally:
        path.unlink()


@pytest.mark.parametrize("parser", [(10, 3), (11, 1)])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_it_computes_what_the_exported_graph_does(
    name: str, parser: tuple[int, int], graphs: dict[str, Path]
) -> None:
    """The padding row of a bucket, which counts no patches, is among them."""
    graph = graphs[name]
    x, grid = sample_batch(GRID, HEAD_DIM_80, seed=3)
    feeds = {
        "pixel_values": x.astype(np.float16 if name == "fp16" else np.float32),
        "grid_thw": np.concatenate([grid, [[0, 2, 2]]]),
    }
    (exported,) = run_model(ir.load(graph), graph.parent, **feeds)
    model = lowered_model(graph, Lowering("matmul"), parser)
    (lowered,) = run_model(model, graph.parent, **feeds)
    tolerance = {"fp32": 1e-6, "fp16": 2e-3}[name]
    assert relative_l2(lowered, exported) < tolerance
    # The control: without the mask of the running sum, each patch belongs to another image.
    next(
        node for node in model.graph if (node.name or "").endswith(".taken")
    ).op_type = "LessOrEqual"
    (wrong,) = run_model(model, graph.parent, **feeds)
    assert not relative_l2(wrong, exported) < 10 * tolerance


def test_float16_statistics_fail_parity_and_float32_statistics_pass_it(tmp_path: Path) -> None:
    """With massive activations, as trained weights make them, against PyTorch in float64."""
    source = WeightSource(random_config=HEAD_DIM_80, seed=3, random_kind="outliers")
    directory = tmp_path / "m"
    export_model_directory(source, directory)
    graph = directory / derive_fp16(directory, Manifest.read(directory), check=False)
    x, grid = sample_batch(((1, 8, 8), (1, 6, 4)), HEAD_DIM_80, seed=5)
    encoder = source.load(torch.float32).encoder.double()
    with torch.inference_mode():
        exact = encoder(torch.from_numpy(x).double(), torch.from_numpy(grid)).numpy()
    good = lowered_model(graph, Lowering("matmul"), (10, 3))
    bad = lowered_model(graph, Lowering("matmul"), (10, 3))
    statistics_in_float16(bad)
    feeds: dict[str, Any] = {"pixel_values": x.astype(np.float16), "grid_thw": grid}
    right, wrong = (
        metrics(run_as_written(model, directory, **feeds), exact) for model in (good, bad)
    )
    gate = PRECISIONS["fp16"].gate
    assert gate.failures(right, None) == []
    assert gate.failures(wrong, None)


@pytest.mark.parametrize("body", [*PRODUCTS, *FUSED, "packed"])
def test_tensorrt_rtx_makes_no_loop_and_no_condition_of_it(
    body: AttentionBody, graphs: dict[str, Path]
) -> None:
    """The parser that is here, on the graph as its engines are built from it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = ir.to_proto(lowered_model(graphs["fp16"], Lowering(body), (11, 1)))
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString(), str(graphs["fp16"])), parser.get_error(0).desc()
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = {layer.type for layer in layers}
    unwanted = {
        trt.LayerType.CONDITION,
        trt.LayerType.CUMULATIVE,
        trt.LayerType.ITERATOR,
        trt.LayerType.LOOP_OUTPUT,
        trt.LayerType.NON_ZERO,
        trt.LayerType.RECURRENCE,
        trt.LayerType.TRIP_LIMIT,
    }
    assert not kinds & unwanted
    norms = [layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION]
    assert len(norms) == 2 * HEAD_DIM_80.num_hidden_layers + 1
    assert {layer.get_input(0).dtype for layer in norms} == {trt.DataType.FLOAT}
