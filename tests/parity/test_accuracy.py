"""How accuracy is measured: the float64 encoder, rounding, magnitudes, and the rule for a jump."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import ExportError, InputError, ParityError
from mmvision_export.core.metrics import Metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.random_kind import RandomKind
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.weight_statistics import weight_statistics
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.encoders import Encoders
from mmvision_export.parity.float64 import Float64Encoder
from mmvision_export.parity.graphs import graph_from_file
from mmvision_export.parity.jump import StageDistance, first_jump
from mmvision_export.parity.layers import compare_layers
from mmvision_export.parity.magnitudes import (
    FLOAT16_MAX,
    Magnitude,
    observed_magnitudes,
    overflow_warnings,
)
from mmvision_export.parity.rounded import rounded_model
from mmvision_export.parity.samples import Sample, sample_from_files, samples_from_grids
from mmvision_export.parity.sessions import arrays_from_model
from mmvision_export.parity.stages import facts_of_graph, stage_names, stage_values
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, copy_of, grids
from tests.support.errors import refused

SOURCE = WeightSource(random_config=HEAD_DIM_80, seed=1)


def sample(grid: list[tuple[int, int, int]]) -> Sample:
    return Sample("sample", *batch(grid, HEAD_DIM_80))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float type -> model directory."""
    folder = tmp_path_factory.mktemp("narrow")
    for precision in ("fp16", "bf16"):
        export_model_directory(SOURCE, folder / precision, precision=precision)
    return {precision: folder / precision for precision in ("fp16", "bf16")}


def test_the_streamed_float64_encoder_is_the_float64_encoder(encoder: VisionEncoderModule) -> None:
    pixels, rows = (torch.from_numpy(array) for array in batch(GRIDS["three"], HEAD_DIM_80))
    streamed = Float64Encoder(encoder)
    with torch.inference_mode():
        result = streamed(pixels.double(), rows)
        assert result.dtype == torch.float64
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}  # as they were
        whole = encoder_from_state_dict(
            HEAD_DIM_80, random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64)
        )
        assert torch.equal(result, whole(pixels.double(), rows))
        assert not torch.equal(result, encoder(pixels, rows).double())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_gives_values_of_the_type(precision: str, narrow: dict[str, Path]) -> None:
    """Stages hold values of the type alone; the first product is PyTorch's."""
    path = narrow[precision] / "model.onnx"
    model = rounded_model(ir.load(path), precision)
    values = stage_values(model.graph, HEAD_DIM_80)
    assert tuple(values) == stage_names(HEAD_DIM_80)
    one = sample(GRIDS["three"])
    outputs = dict(
        zip(
            values,
            arrays_from_model(model, path.parent, one, list(values.values())),
            strict=True,
        )
    )
    dtype = DTYPES[precision]
    for output in outputs.values():
        tensor = torch.from_numpy(output)
        assert torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    weight = SOURCE.load(dtype).encoder.vision_tower.vision_model.embeddings.patch_embedding.weight
    exact = torch.from_numpy(one.pixel_values).to(dtype).double() @ weight.double().T
    off = (torch.from_numpy(outputs["embeddings"]).double() - exact).abs()
    # Half a unit in the last place, and a little for float32 accumulation that tips a tie.
    assert bool((off <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-5).all())


def test_rounding_leaves_float32_alone_and_refuses_control_flow(
    exported: Path, narrow: dict[str, Path]
) -> None:
    model = ir.load(exported / "model.onnx")
    assert rounded_model(model, "fp32") is model
    looped = ir.load(narrow["fp16"] / "model.onnx")
    body = ir.Graph([], [], nodes=[], name="body")
    branch = ir.node(
        "If", [looped.graph.inputs[1]], attributes={"then_branch": body}, name="branch"
    )
    looped.graph.append(branch)
    looped.graph.outputs.append(branch.outputs[0])
    with refused(ParityError, "node branch", "If"):
        rounded_model(looped, "fp16")


def test_facts_of_graphs(exported: Path, narrow: dict[str, Path]) -> None:
    found = {name: facts_of_graph(ir.load(path / "model.onnx")) for name, path in narrow.items()}
    assert {name: (facts.precision, facts.float_type) for name, facts in found.items()} == {
        "fp16": ("fp16", "fp16"),
        "bf16": ("bf16", "bf16"),
    }
    model = ir.load(exported / "model.onnx")
    assert facts_of_graph(model).data_files == ("model.onnx.data",)
    model.graph.append(ir.node("DynamicQuantizeLinear", [model.graph.inputs[0]], num_outputs=3))
    assert facts_of_graph(model).precision == "int8"
    assert facts_of_graph(model).float_type == "fp32"


@settings(max_examples=5)
@given(grid=grids(max_images=3))
def test_no_healthy_graph_jumps(
    grid: list[tuple[int, int, int]], exported: Path, narrow: dict[str, Path]
) -> None:
    """A stage's error is that of eager PyTorch within the rule's factor."""
    paths = {"fp32": exported, **narrow}
    graphs = {name: graph_from_file(path / "model.onnx") for name, path in paths.items()}
    compared = compare_layers(
        sample(grid),
        graphs,
        encoders=Encoders(SOURCE, Manifest.read(exported)),
        float_types=list(paths),
    )
    for name, graph in compared.graphs.items():
        assert graph.jump is None, name
        assert graph.missing == []
        for row, beside in zip(graph.stages, compared.eager[name], strict=True):
            assert (
                0.4 * beside.distance.relative_l2
                < row.distance.relative_l2
                < 2 * beside.distance.relative_l2
            )


def rows_of(*errors: float) -> list[StageDistance]:
    return [
        StageDistance(f"layers.{i}", Metrics(0.0, error, 1.0, int(np.isnan(error))), 1.0, 1.0)
        for i, error in enumerate(errors)
    ]


def test_the_rule_for_a_jump_by_hand() -> None:
    nan = float("nan")
    eager = rows_of(1e-4, 2e-4, 3e-4)
    assert first_jump(rows_of(1.9e-4, 3.9e-4, 5.9e-4), eager) is None
    jump = first_jump(rows_of(1e-4, 4.1e-4, 9e-4), eager)
    assert jump is not None
    assert (jump.stage, jump.expected) == ("layers.1", 2e-4)
    overflow = first_jump(rows_of(1e-4, nan, nan), eager)
    assert overflow is not None
    assert overflow.stage == "layers.1"
    assert "lacks the range" not in overflow.reason
    both = first_jump(rows_of(1e-4, nan, nan), rows_of(1e-4, nan, nan))
    assert both is not None
    assert "lacks the range" in both.reason
    # Quantised: four stages of equal error add up to 1, sqrt(2), sqrt(3), 2; a fifth stands out.
    grown = [0.01 * step**0.5 for step in (1, 2, 3, 4)]
    assert first_jump(rows_of(*grown), None) is None
    quantised = first_jump(rows_of(*grown, 0.1), None)
    assert quantised is not None
    assert quantised.stage == "layers.4"
    # A CPU flavour shows no stage; and where the first overflows no other error is known.
    assert first_jump([], None) is None
    at_once = first_jump(rows_of(nan, nan), None)
    assert at_once is not None
    assert at_once.stage == "layers.0"


def test_gates_compare_with_eager_only_where_that_is_finite() -> None:
    broken = Metrics(float("nan"), float("nan"), float("nan"), 3)
    assert PRECISIONS["fp16"].gate.limit(broken) is None
    assert not PRECISIONS["fp16"].gate.failures(Metrics(0, 0.01, 1, 0), broken)
    assert PRECISIONS["fp16"].gate.failures(Metrics(0, 0.01, 1, 0), Metrics(0, 0.004, 1, 0))
    assert PRECISIONS["int8"].gate.failures(Metrics(0, 0.01, 0.998, 0), None)
    # Whether it is the graph that falls short, or the type.
    (alone,) = PRECISIONS["bf16"].gate.failures(
        Metrics(0, 0.01, 0.8, 0), Metrics(0, 0.01, 0.995, 0)
    )
    (both,) = PRECISIONS["bf16"].gate.failures(Metrics(0, 0.01, 0.8, 0), Metrics(0, 0.01, 0.9, 0))
    assert "PyTorch itself has" not in alone
    assert "PyTorch itself has 0.900000 in this precision, which does not suffice here" in both


def test_magnitudes_are_those_of_every_intermediate_tensor() -> None:
    """Against a second way to see every tensor: PyTorch's own dispatch of each operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        value = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.is_floating_point()
                    and tensor.shape[-1:] != (39,)
                ):
                    self.value = max(self.value, float(tensor.abs().max()))
            return out

    state = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64)
    state["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"] *= 1000
    encoder = encoder_from_state_dict(HEAD_DIM_80, state)
    pixels, rows = (torch.from_numpy(array) for array in batch(GRIDS["three"], HEAD_DIM_80))
    with torch.no_grad():
        with Largest() as largest:  # type: ignore[no-untyped-call]
            encoder(pixels.double(), rows)
        with observed_magnitudes(encoder) as found:
            encoder(pixels.double(), rows)
        q, k = (
            torch.randn(
                5, HEAD_DIM_80.num_attention_heads, HEAD_DIM_80.head_dim, dtype=torch.float64
            )
            for _ in range(2)
        )
    worst = max(found.values(), key=lambda magnitude: magnitude.value)
    assert worst.value == pytest.approx(largest.value)
    assert worst.stage == "layers.1"
    assert "layers.1.mlp.fc1" in worst.where
    # Cauchy and Schwarz.
    assert float((q * k).sum(-1).abs().max()) <= float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    assert all(
        (found[s].scores_bound is not None) == s.startswith("layers.")
        for s in stage_names(HEAD_DIM_80)
    )


def test_activations_near_the_end_of_float16_are_told() -> None:
    def near(value: float, bound: float = 1.0) -> list[Magnitude]:
        return [
            Magnitude("layers.0", value, "output of layers.0.mlp.fc1", bound),
            Magnitude("embeddings", 1.0, "x"),
        ]

    assert overflow_warnings(near(FLOAT16_MAX / 4.1), ["fp16"]) == []
    (told,) = overflow_warnings(near(FLOAT16_MAX / 3.9), ["fp16"])
    assert told.startswith("activations reach 1.68e+04, within a factor of 3.9")
    (told,) = overflow_warnings(near(FLOAT16_MAX * 2), ["fp32"])
    assert told.startswith("in a float16 graph, activations would reach 1.31e+05, beyond")
    (told,) = overflow_warnings(near(1.0, FLOAT16_MAX), ["fp16"])
    assert told.startswith("attention scores may reach")


def test_patches_from_files(tmp_path: Path) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    np.save(tmp_path / "x.npy", pixels.astype(np.float16))
    np.save(tmp_path / "g.npy", rows)
    read = sample_from_files(tmp_path / "x.npy", tmp_path / "g.npy", HEAD_DIM_80)
    assert read.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(read.pixel_values, pixels.astype(np.float16))
    np.save(tmp_path / "g.npy", rows[:1])
    with refused(InputError, "grid_thw", 4, "pixel_values", len(pixels)):
        sample_from_files(tmp_path / "x.npy", tmp_path / "g.npy", HEAD_DIM_80)
    with refused(InputError, "y.npy", reason="missing"):
        sample_from_files(tmp_path / "y.npy", tmp_path / "g.npy", HEAD_DIM_80)


def test_weight_statistics(exported: Path, tmp_path: Path) -> None:
    recorded = Manifest.read(exported).weights
    state = random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float32)
    assert recorded["largest"]["magnitude"] == max(
        float(tensor.abs().max()) for tensor in state.values()
    )
    assert recorded["beyond_float16"] == []
    name = "multi_modal_projector.linear_1.weight"
    state[name][0, :3] = torch.tensor([1e5, 1e-9, 2.0**-24])
    found = weight_statistics(encoder_from_state_dict(HEAD_DIM_80, state))
    assert found["largest"] == {"name": name, "magnitude": 1e5}
    assert found["beyond_float16"] == [name]
    assert found["zero_in_float16"] == recorded["zero_in_float16"] + 1
    half = encoder_from_state_dict(
        HEAD_DIM_80, {name: tensor.half() for name, tensor in state.items()}
    )
    with refused(ExportError, "float16", name) as caught:
        weight_statistics(half)
    assert "--bf16" in str(caught.value.hint)


def test_deriving_float16_names_a_weight_it_cannot_hold(exported: Path, tmp_path: Path) -> None:
    from tests.support.faults import rewrite

    def enlarge(model: ir.Model) -> None:
        value = model.graph.initializers["layers.1.mlp.fc2.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e6), name=value.name)

    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, enlarge)
    with refused(ExportError, "layers.1.mlp.fc2.weight", "float16") as caught:
        derive_fp16(directory, Manifest.read(directory))
    assert "--bf16" in str(caught.value.hint)
    assert not (directory / "model.fp16.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "outliers"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_depth(precision: str, kind: RandomKind, tmp_path: Path) -> None:
    """32 layers: at every stage at most twice eager PyTorch's error."""
    config = dataclasses.replace(HEAD_DIM_80, num_hidden_layers=32)
    source = WeightSource(random_config=config, seed=1, random_kind=kind)
    export_model_directory(source, tmp_path / "m", precision=precision)
    one = {"sizes": ((1, 4, 6), (1, 10, 3), (1, 1, 1))}
    result = check_parity(tmp_path / "m", samples=samples_from_grids(config, one))
    rows = {row.runner: row.metrics for row in result.rows}
    limit = 2 * rows[f"pytorch-{precision}"].relative_l2
    assert rows["model.onnx (rounded)"].relative_l2 <= limit
    assert precision == "bf16" or rows["model.onnx"].relative_l2 <= limit
    assert result.layers.graphs["model.onnx"].jump is None
    assert result.passed, [failure for row in result.rows for failure in row.failures]


@pytest.mark.slow
def test_full_width(tmp_path: Path) -> None:
    """Two layers, the projector and the merger at the released width, with outliers, in float16.

    3.5 GB of memory.
    """
    config = EncoderConfig(num_hidden_layers=2)
    export_model_directory(
        WeightSource(random_config=config, seed=1, random_kind="outliers"),
        tmp_path / "m",
        precision="fp16",
    )
    result = check_parity(
        tmp_path / "m", samples=samples_from_grids(config, {"sizes": ((1, 8, 8), (1, 3, 5))})
    )
    assert result.passed, [row.failures for row in result.rows]
    assert result.layers.graphs["model.onnx"].jump is None
