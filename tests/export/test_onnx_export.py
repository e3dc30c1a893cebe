"""The exported file: its structure, its names, and its numbers in ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import ExportError, OutputError
from mmvision_export.core.files import sha256_of
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.models.minimax_m3_vl.checkpoint import encoder_from_state_dict
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.random_weights import random_state_dict
from mmvision_export.models.weights import WeightSource
from mmvision_export.ops.varlen_attention.onnx_op import attention_body_of
from tests.support.configs import GRIDS, HEAD_DIM_80, arrays, batch, grids, relative_l2, run_graph
from tests.support.errors import refused

SOURCE = WeightSource(random_config=HEAD_DIM_80, seed=1)


@pytest.fixture(scope="module")
def float64_state() -> dict[str, np.ndarray]:
    return arrays(random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float64))


def test_contract(exported: Path) -> None:
    model = ir.load(exported / "model.onnx")
    described = {
        v.name: (v.dtype, [str(d) for d in v.shape or ()])
        for v in (*model.graph.inputs, *model.graph.outputs)
    }
    assert described == {
        "pixel_values": (ir.DataType.FLOAT, ["num_patches", "1176"]),
        "grid_thw": (ir.DataType.INT64, ["num_images", "3"]),
        "image_embeds": (ir.DataType.FLOAT, ["num_image_tokens", "96"]),
    }
    assert model.opset_imports == {"": 23, "mmvision": 1}
    assert attention_body_of(model) == "attention"


def test_custom_ops_carry_definition_and_plugin_attributes(exported: Path) -> None:
    model = ir.load(exported / "model.onnx")
    custom = [node for node in model.graph if node.domain == "mmvision"]
    assert [node.op_type for node in custom] == ["QKRotaryEmbedding", "VarlenAttention"] * 2
    for node in custom:
        assert node.op_identifier() in model.functions
        assert node.attributes["plugin_namespace"].as_string() == "mmvision"
        assert node.attributes["plugin_version"].as_string() == "1"
    assert custom[1].attributes["scale"].as_float() == pytest.approx(80**-0.5)


def test_names_are_the_modules(exported: Path) -> None:
    model = ir.load(exported / "model.onnx")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    for expected in (
        "embeddings.patch_embedding",
        "pre_layrnorm",
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.VarlenAttention",
        "layers.1.mlp.activation",
        "multi_modal_projector.linear_1",
        "patch_merge_mlp.linear_2",
    ):
        assert expected in names
    assert "layers.0.mlp.fc1.weight" in model.graph.initializers
    assert {"num_patches", "num_images"} <= {
        str(d) for node in model.graph for out in node.outputs for d in out.shape or ()
    }


def test_nothing_of_the_machine_is_in_the_graph(exported: Path) -> None:
    """Traces of the exporting machine's files and stack do not travel with the model."""
    content = (exported / "model.onnx").read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content


def test_patch_embedding_is_one_matrix_product(exported: Path) -> None:
    operators = {node.op_type for node in ir.load(exported / "model.onnx").graph}
    assert "Conv" not in operators
    assert not operators & {"Loop", "If", "Scan", "SequenceInsert"}


def test_weights_are_external_and_the_graph_small(exported: Path) -> None:
    model = ir.load(exported / "model.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert isinstance(value.const_value, ir.ExternalTensor) or value.const_value.nbytes < 256
    assert (exported / "model.onnx").stat().st_size < 200_000


def test_checker(exported: Path) -> None:
    onnx.checker.check_model(exported / "model.onnx", full_check=True)


@pytest.mark.parametrize(
    "level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
)
def test_every_optimization_level(
    exported: Path, level: str, float64_state: dict[str, np.ndarray]
) -> None:
    pixels, grid = batch(GRIDS["three"], HEAD_DIM_80)
    out = run_graph(
        exported / "model.onnx", pixels, grid, getattr(onnxruntime.GraphOptimizationLevel, level)
    )
    assert (
        relative_l2(out, reference.vision_encoder(float64_state, pixels, grid, HEAD_DIM_80)) <= 2e-6
    )


@settings(max_examples=25)
@given(grid=grids())
def test_any_grid(
    exported: Path, encoder: VisionEncoderModule, grid: list[tuple[int, int, int]]
) -> None:
    """One graph for every number of patches and images, though it was traced with two images."""
    pixels, rows = batch(grid, HEAD_DIM_80)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
    assert relative_l2(run_graph(exported / "model.onnx", pixels, rows), expected) <= 2e-6


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_low_opsets_have_matmul_attention(
    opset: int, tmp_path: Path, float64_state: dict[str, np.ndarray]
) -> None:
    manifest = export_model_directory(SOURCE, tmp_path / "m", opset=opset)
    model = ir.load(tmp_path / "m" / "model.onnx")
    assert manifest.opset == model.opset_imports[""] == opset
    assert attention_body_of(model) == "matmul"
    pixels, grid = batch(GRIDS["three"], HEAD_DIM_80)
    out = run_graph(tmp_path / "m" / "model.onnx", pixels, grid)
    assert (
        relative_l2(out, reference.vision_encoder(float64_state, pixels, grid, HEAD_DIM_80)) <= 2e-6
    )


def test_float16_error_is_at_most_twice_eager(
    tmp_path: Path, float64_state: dict[str, np.ndarray]
) -> None:
    export_model_directory(SOURCE, tmp_path / "m", precision="fp16")
    half = encoder_from_state_dict(
        HEAD_DIM_80, random_state_dict(HEAD_DIM_80, seed=1, dtype=torch.float16)
    )
    for grid in GRIDS.values():
        pixels, rows = batch(grid, HEAD_DIM_80)
        pixels = pixels.astype(np.float16)
        expected = reference.vision_encoder(float64_state, pixels, rows, HEAD_DIM_80)
        with torch.inference_mode():
            eager = half(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
        out = run_graph(tmp_path / "m" / "model.onnx", pixels, rows)
        assert out.dtype == np.float16
        assert relative_l2(out, expected) <= 2 * relative_l2(eager, expected)
        assert relative_l2(eager, expected) > 1e-5  # the limit is one: float16 does cost something


def test_bfloat16_graph_takes_and_gives_float32(tmp_path: Path) -> None:
    export_model_directory(SOURCE, tmp_path / "m", precision="bf16")
    model = ir.load(tmp_path / "m" / "model.onnx")
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [
        ir.DataType.FLOAT,
        ir.DataType.INT64,
        ir.DataType.FLOAT,
    ]
    weights = {v.dtype for name, v in model.graph.initializers.items() if name.endswith("weight")}
    assert weights == {ir.DataType.BFLOAT16}


def test_manifest_describes_the_files(exported: Path) -> None:
    manifest = Manifest.read(exported)
    source = {"kind": "random", "random_kind": "plain", "preset": None, "seed": 1, "sha256": ""}
    assert {**manifest.source, "sha256": ""} == source
    assert len(manifest.source["sha256"]) == 64
    assert {"torch", "onnx", "mmvision-export"} <= set(manifest.versions)
    for name, record in manifest.files.items():
        assert sha256_of(exported / name) == record.sha256
    assert json.loads((exported / "preprocessor_config.json").read_text())["patch_size"] == 14


def test_export_is_reproducible(exported: Path, tmp_path: Path) -> None:
    again = export_model_directory(SOURCE, tmp_path / "m")
    assert again.files == Manifest.read(exported).files


def test_export_refuses_an_existing_directory(exported: Path, tmp_path: Path) -> None:
    with refused(OutputError, exported, reason="exists"):
        export_model_directory(SOURCE, exported)
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_bytes(b"x")
    with refused(OutputError, precious, "manifest.json", "--force"):
        export_model_directory(SOURCE, precious, force=True)
    assert (precious / "cat.jpg").exists()


def test_export_refuses_an_opset_it_does_not_have(tmp_path: Path) -> None:
    for opset in (17, 24):
        with refused(ExportError, "opset", 18, 23, opset):
            export_model_directory(SOURCE, tmp_path / "m", opset=opset)
    assert not list(tmp_path.iterdir())


def polygraphy(
    *arguments: str, setup: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    program = f"import sys\n{setup}\nfrom polygraphy.tools import main\nsys.argv[0] = 'polygraphy'\nmain()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_polygraphy_runs_the_file(exported: Path) -> None:
    result = polygraphy(
        "run", "--onnxrt", str(exported / "model.onnx"),
        "--input-shapes", "pixel_values:[48,1176]", "grid_thw:[2,3]",
        "--val-range", "grid_thw:[2,2]",
        "--data-loader-script", str(Path(__file__).parents[1] / "support" / "polygraphy_data.py"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_tensorrt_parses_the_file(exported: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = polygraphy(
        "inspect", "model", str(exported / "model.onnx"), "--display-as=trt",
        # Polygraphy 0.53.6 parses with TensorRT-RTX, then looks for the enums it prints in a module
        # named tensorrt.
        setup="import tensorrt_rtx; sys.modules['tensorrt'] = tensorrt_rtx",
        POLYGRAPHY_USE_TENSORRT_RTX="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "image_embeds" in result.stdout
