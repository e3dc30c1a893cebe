"""Checkpoints with equal weights: every graph has a weight of its own for each parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.processor import cpu_has_vnni
from mmvision_export.engine.attention import Lowering, lowered_model
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.parser_findings import parser_findings
from mmvision_export.export import onnx_export
from mmvision_export.export.onnx_export import export_model_directory, onnx_from_encoder
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.ops.varlen_attention.onnx_op import AttentionBody
from mmvision_export.quantize.choices import FLAVOURS
from mmvision_export.quantize.quantize import quantize
from mmvision_export.quantize.units import readers_of, units_of
from tests.support.checkpoints import State, write_checkpoint
from tests.support.configs import HEAD_DIM_80, relative_l2, run_graph
from tests.support.lowered import run_model

BATCHES = [sample_batch(((1, 6, 8), (1, 2, 2)), HEAD_DIM_80, seed=seed) for seed in (0, 1)]
BODIES: tuple[AttentionBody, ...] = ("attention", "uniform_attention", "packed")
PARSER = (11, 1)


def fresh_norms(state: State) -> State:
    """As transformers initialises: norms one and zero, biases zero."""

    def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros_like(tensor)
        return torch.ones_like(tensor) if tensor.ndim == 1 else tensor

    return {name: fill(name, tensor) for name, tensor in state.items()}


def tied(state: State) -> State:
    """Both layers are one, and each has one matrix for q, k and v."""
    equal = {"layers.1.": "layers.0.", "k_proj": "q_proj", "v_proj": "q_proj"}

    def source(name: str) -> str:
        for old, new in equal.items():
            name = name.replace(old, new)
        return name

    return {name: state[source(name)].clone() for name in state}


STATES = {
    kind.__name__: kind(random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float32))
    for kind in (fresh_norms, tied)
}


@pytest.fixture(scope="module", params=STATES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with every graph of ours."""
    folder = tmp_path_factory.mktemp(kind)
    checkpoint = write_checkpoint(folder / "checkpoint", STATES[kind])
    directory = folder / "m"
    export_model_directory(WeightSource(checkpoint=str(checkpoint)), directory)
    derive_fp16(directory, Manifest.read(directory))
    for flavour in FLAVOURS:
        quantize(
            directory,
            Manifest.read(directory),
            flavour,
            calibration=BATCHES[:1],
            held_out=BATCHES[1:],
            min_cosine=0.99,
        )
    return directory


def parameters_of(model: ir.Model) -> set[str]:
    return {name for name in model.graph.initializers if name.endswith((".weight", ".bias"))}


def exact_embeddings(kind: str) -> np.ndarray:
    """Of the second batch, by PyTorch in float64."""
    pixels, grid = BATCHES[1]
    encoder = encoder_from_state_dict(HEAD_DIM_80, STATES[kind]).double()
    exact: np.ndarray = encoder(torch.from_numpy(pixels).double(), torch.from_numpy(grid)).numpy()
    return exact


def test_every_parameter_has_a_name(directory: Path, exported: Path) -> None:
    """The control is a graph whose weights all differ."""
    model = ir.load(directory / "model.onnx")
    assert parameters_of(model) == parameters_of(ir.load(exported / "model.onnx"))
    units = units_of(model)
    assert len(units) == 4 * HEAD_DIM_80.num_hidden_layers + 5
    assert all(len(readers_of(model, unit)) == len(unit.linears) for unit in units)


def test_the_optimiser_alone_merges_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without own weights, names go, so that the tests here can fail."""
    encoder = encoder_from_state_dict(HEAD_DIM_80, STATES[kind])
    own = onnx_from_encoder(encoder)
    monkeypatch.setattr(onnx_export, "optimize_with_own_weights", lambda p: p.optimize())
    assert parameters_of(onnx_from_encoder(encoder)) < parameters_of(own)


def test_every_graph_computes_the_encoder(kind: str, directory: Path) -> None:
    pixels, grid = BATCHES[1]
    exact = exact_embeddings(kind)
    bounds = {"onnx": 1e-5, "cpu": 1e-5, "fp16": 5e-3, "cpu-int8": 0.1, "int8": 0.1, "fp8": 0.1}
    if cpu_has_vnni():
        bounds["cpu-int8-vnni"] = 0.1
    graphs = {path.name.split(".")[-2]: path for path in directory.glob("*.onnx")}
    graphs["onnx"] = graphs.pop("model")
    graphs.pop("uniform")  # which takes slots: its numbers are tests/graph/test_uniform.py's
    if not cpu_has_vnni():
        graphs.pop("cpu-int8-vnni")
    assert graphs.keys() == bounds.keys()
    for name, path in graphs.items():
        dtype = ir.load(path).graph.inputs[0].dtype
        assert dtype is not None
        result = run_graph(path, pixels.astype(dtype.numpy()), grid)
        assert relative_l2(result, exact) < bounds[name], name
        assert relative_l2(np.roll(result, 1, axis=0), exact) > 0.2, name


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("graph", ["model.fp16.onnx", "model.int8.onnx", "model.fp8.onnx"])
def test_a_tensorrt_parser_gets_nothing_it_warns_of(
    directory: Path, graph: str, body: AttentionBody
) -> None:
    model = lowered_model(directory / graph, Lowering(body), PARSER)
    assert parser_findings(model, PARSER) == []


def test_the_lowered_graph_computes_the_encoder(kind: str, directory: Path) -> None:
    pixels, grid = BATCHES[1]
    model = lowered_model(directory / "model.onnx", Lowering("matmul"), PARSER)
    (result,) = run_model(model, directory, pixel_values=pixels, grid_thw=grid)
    assert relative_l2(result, exact_embeddings(kind)) < 1e-5


def test_other_precisions_and_opsets(kind: str) -> None:
    state = {name: t.to(torch.bfloat16) for name, t in STATES[kind].items()}
    names = parameters_of(onnx_from_encoder(encoder_from_state_dict(HEAD_DIM_80, state)))
    old = onnx_from_encoder(encoder_from_state_dict(HEAD_DIM_80, STATES[kind]), opset=18)
    assert parameters_of(old) == names
    assert len(names) == len(state)
