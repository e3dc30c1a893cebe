"""Quantised flavours: the arithmetic, the gate and what it keeps, and engines built from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from mmvision_export.artifacts.manifest import DATA, Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, EngineError, ManifestError, QuantizationError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.progress import Progress
from mmvision_export.engine.build import build_engine
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity.stages import facts_of_graph
from mmvision_export.quantize import plan as plan_module
from mmvision_export.quantize.balancing import static_rounding
from mmvision_export.quantize.choices import CALIBRATION_METHODS, FLAVOURS, Flavour
from mmvision_export.quantize.formats import FP8, INT8, scale_from_magnitude
from mmvision_export.quantize.qdq import balance
from mmvision_export.quantize.quantize import QuantizationReport, quantize
from mmvision_export.quantize.statistics import Batch, magnitudes, run, samples
from mmvision_export.quantize.units import units_of
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused

CONFIG = dataclasses.replace(HEAD_DIM_80, num_hidden_layers=4)
CALIBRATION = [sample_batch(((1, 8, 8), (1, 3, 5)), CONFIG, seed=seed) for seed in range(2)]
HELD_OUT = [sample_batch(((1, 6, 7), (2, 2, 3)), CONFIG, seed=seed) for seed in (10, 11)]
AMPERE, ADA, BLACKWELL = map(ComputeCapability.parse, ("8.6", "8.9", "12.0"))
UNITS = 4 * CONFIG.num_hidden_layers + 5
OUTLIERS = WeightSource(random_config=CONFIG, seed=3, random_kind="outliers")


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize") / "outliers"
    export_model_directory(OUTLIERS, directory)
    return directory


@pytest.fixture(scope="module")
def quantized(
    outliers: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, QuantizationReport]]:
    """A directory with every flavour, made with the fallback."""
    directory = copy_of(outliers, tmp_path_factory.mktemp("quantized") / "m")
    return directory, {flavour: make(directory, flavour) for flavour in FLAVOURS}


def make(directory: Path, flavour: Flavour, **options: Any) -> QuantizationReport:
    return quantize(
        directory,
        Manifest.read(directory),
        flavour,
        **{"calibration": CALIBRATION, "held_out": HELD_OUT, "method": "minmax", **options},
    )


def float64_embeddings(batches: list[Batch]) -> np.ndarray:
    encoder = OUTLIERS.load(torch.float32).encoder.double()
    with torch.inference_mode():
        return np.concatenate(
            [encoder(torch.from_numpy(x).double(), torch.from_numpy(g)).numpy() for x, g in batches]
        )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outliers_pass_the_gate_with_the_fallback(
    flavour: Flavour, quantized: tuple[Path, dict[str, QuantizationReport]]
) -> None:
    """Against PyTorch in float64. The control is the same graph with every unit quantised."""
    directory, reports = quantized
    report = reports[flavour]
    graph = directory / f"model.{flavour}.onnx"
    dtype = np.float32 if flavour == "cpu-int8" else np.float16
    result = np.concatenate(run(graph, HELD_OUT, weights_in=directory, dtype=dtype))
    distance = metrics(result, float64_embeddings(HELD_OUT))
    assert distance.min_cosine >= 0.999
    assert report.without_fallback < 0.999 <= report.reached
    assert len(report.kept) + len(report.quantized) == UNITS
    assert 0 < len(report.kept) < UNITS
    print(f"{flavour}: {len(report.kept)} of {UNITS} units kept, {report.reached:.6f}")
    manifest = Manifest.read(directory)
    manifest.verify(directory, manifest.files)
    assert manifest.quantization[graph.name] == report.to_dict()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_graph_has_what_the_report_says(
    flavour: Flavour, quantized: tuple[Path, dict[str, QuantizationReport]]
) -> None:
    directory, reports = quantized
    model = ir.load(directory / f"model.{flavour}.onnx")
    stored = {
        "int8": ir.DataType.INT8,
        "fp8": ir.DataType.FLOAT8E4M3FN,
        "cpu-int8": ir.DataType.UINT8,
    }[flavour]
    weights = [
        v
        for v in model.graph.initializers.values()
        if v.dtype == stored and v.shape and len(v.shape) == 2
    ]
    products = sum(3 if name.endswith("qkv") else 1 for name in reports[flavour].quantized)
    assert len(weights) == products
    if flavour == "cpu-int8":
        kept = [
            v for v in model.graph.initializers.values() if v.name and v.name.endswith(".weight")
        ]
        shared = [v for v in kept if isinstance(v.const_value, ir.ExternalTensor)]
        assert any(str(v.const_value.location) == "model.onnx.data" for v in shared)  # type: ignore[union-attr]
        data = (directory / "model.cpu-int8.onnx.data").stat().st_size
        assert (
            data
            < sum(v.const_value.nbytes for v in weights if v.const_value) * 1.5 + 4096 * 3 * UNITS
        )
    else:
        assert model.graph.inputs[0].dtype == ir.DataType.FLOAT16
        attention = [node for node in model.graph if node.op_type == "VarlenAttention"]
        assert all(
            value.dtype == ir.DataType.FLOAT16
            for node in attention
            for value in node.inputs[:3]
            if value
        )


def test_a_gate_that_float16_itself_fails_is_refused(outliers: Path, tmp_path: Path) -> None:
    directory = copy_of(outliers, tmp_path / "m")
    with refused(QuantizationError, "int8", 0.99999999):
        make(directory, "int8", min_cosine=0.99999999)
    assert sorted(p.name for p in directory.iterdir()) == sorted(p.name for p in outliers.iterdir())


def test_a_corrupted_scale_is_caught(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twentieth of the range of every input.

    The gate catches what the same call accepts without the fault.
    """
    directory = copy_of(exported, tmp_path / "m")
    assert make(directory, "int8", min_cosine=0.99).kept == {}
    exact = magnitudes

    def wrong(*arguments: Any) -> dict[str, float]:
        return {name: value / 20 for name, value in exact(*arguments).items()}

    monkeypatch.setattr(plan_module, "magnitudes", wrong)
    with refused(QuantizationError, "int8", 0.99):
        make(directory, "int8", min_cosine=0.99, force=True)


def test_what_a_killed_run_left_does_not_stop_the_next(exported: Path, tmp_path: Path) -> None:
    """It left a second name of the weights, and onnx-ir reads no file that has two."""
    directory = copy_of(exported, tmp_path / "m")
    left = directory / ".new.999999999.abc.partial"  # no process has such a number
    left.mkdir()
    (left / DATA).hardlink_to(directory / DATA)
    assert not make(directory, "int8", min_cosine=0.99).kept
    assert not left.exists()
    # The control: with a second name that no such run left, it stops.
    (tmp_path / "other").hardlink_to(directory / DATA)
    with pytest.raises(ManifestError, match="hard links"):
        make(directory, "int8", min_cosine=0.99, force=True)


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_plain_weights_need_no_fallback_to_be_near(
    method: Any, exported: Path, tmp_path: Path
) -> None:
    # With the margin of 1.5 a token needs a cosine of 0.99.
    report = make(copy_of(exported, tmp_path / "m"), "int8", method=method, min_cosine=0.985)
    assert report.reached >= 0.99
    assert not report.kept


def test_balancing_does_not_change_the_function(outliers: Path) -> None:
    model = ir.load(outliers / "model.onnx")
    units = units_of(model)
    found = samples(
        outliers / "model.onnx", [u.input for u in units if u.normed], CALIBRATION, Progress()
    )
    divisors = {
        name: np.sqrt(np.maximum(s.magnitude, 0.01)).astype(np.float32) for name, s in found.items()
    }
    balance(model, units, divisors)
    balanced = run(
        ir.serde.serialize_model(model).SerializeToString(),
        HELD_OUT,
        weights_in=outliers,
        dtype=np.float32,
    )
    exact = run(outliers / "model.onnx", HELD_OUT, weights_in=outliers, dtype=np.float32)
    assert metrics(np.concatenate(balanced), np.concatenate(exact)).relative_l2 < 1e-4
    assert len(divisors) == 2 * CONFIG.num_hidden_layers


def test_the_cpu_flavour_is_made_from_the_cpu_graph(
    quantized: tuple[Path, dict[str, QuantizationReport]],
) -> None:
    """Attention image by image, also from a directory without a CPU graph."""
    directory, reports = quantized
    assert reports["cpu-int8"].source == "model.cpu.onnx"
    assert {report.source for flavour, report in reports.items() if flavour != "cpu-int8"} == {
        "model.onnx"
    }
    model = ir.load(directory / "model.cpu-int8.onnx")
    assert facts_of_graph(model).precision == "int8"  # by which parity's gate is chosen
    operators = {node.op_type for node in model.graph.all_nodes()}
    assert {"MatMulIntegerToFloat", "VarlenAttention", "Scan"} <= operators
    assert "LinearGelu" not in operators


def test_an_image_does_not_depend_on_its_batch(
    quantized: tuple[Path, dict[str, QuantizationReport]],
) -> None:
    directory, _ = quantized
    pixels, grid = HELD_OUT[0]
    with VisionEncoder.open(directory, backend="onnxruntime-cpu", flavour="cpu-int8") as encoder:
        assert encoder.info["precision"] == "cpu-int8"
        together = encoder(pixels, grid)
        first = int(grid[0].prod())
        alone = encoder(pixels[:first], grid[:1])
    np.testing.assert_allclose(
        together[: first // 4], alone, atol=1e-3 * float(np.abs(alone).max())
    )


def test_flavours_that_cannot_be_opened(exported: Path) -> None:
    with refused(BackendError, "openvino", "flavour"):
        VisionEncoder.open(exported, backend="openvino", flavour="cpu-int8")
    for backend in ("auto", "onnxruntime-cpu"):
        with refused(ManifestError, exported, "model.cpu-int8.onnx"):
            VisionEncoder.open(exported, backend=backend, flavour="cpu-int8")


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [("int8", [AMPERE, ADA]), ("fp8", [ADA, BLACKWELL])],
    ids=["int8", "fp8"],
)
def test_engines(
    precision: str,
    capabilities: list[ComputeCapability],
    quantized: tuple[Path, dict[str, QuantizationReport]],
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    directory, _ = quantized
    options: dict[str, Any] = {
        "profiles": [Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)],
        "backend": "tensorrt-rtx",
        "precision": precision,
    }
    engine, record = build_engine(
        directory, Manifest.read(directory), compute_capabilities=capabilities, **options
    )
    assert record.precision == precision
    assert record.compute_capabilities == tuple(capabilities)
    assert record.graph.name == f"model.{precision}.onnx"
    assert engine.name.endswith(f"-{precision}.engine")
    if precision == "fp8":
        with refused(EngineError, "fp8", "8.6"):
            build_engine(
                directory, Manifest.read(directory), compute_capabilities=[AMPERE], **options
            )


def test_an_engine_needs_its_flavour_first(exported: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    profile = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)
    with refused(EngineError, exported, "model.int8.onnx") as caught:
        build_engine(
            exported,
            Manifest.read(exported),
            profiles=[profile],
            backend="tensorrt-rtx",
            precision="int8",
            compute_capabilities=[ADA],
        )
    assert "mmvision quantize --int8" in str(caught.value.hint)


def test_only_float32_models(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="fp16"
    )
    with refused(QuantizationError, tmp_path / "m", "fp16"):
        make(tmp_path / "m", "int8")
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "old", opset=18
    )
    with refused(QuantizationError, "opset", 19, 18):
        make(tmp_path / "old", "int8")


def test_a_value_larger_than_any_of_calibration_is_not_cut_off(outliers: Path) -> None:
    """The control has ranges that end where calibration did."""
    name, graph = "pixel_values", outliers / "model.onnx"
    found = samples(graph, [name], CALIBRATION, Progress())
    measured = float(found[name].magnitude.max())
    reached = magnitudes(graph, found, {}, CALIBRATION, "minmax", Progress())[name]
    rows = np.linspace(-1.2 * measured, 1.2 * measured, 1000, dtype=np.float32)[None]

    def largest_error_in_steps(magnitude: float) -> float:
        rounded = static_rounding(INT8, magnitude)(rows)
        return float(np.abs(rounded - rows).max()) / (magnitude / INT8.maximum)

    # Half a step, and of the scale's rounding to float16 what adds up over 127 steps.
    assert largest_error_in_steps(reached) <= 0.5 + 127 * 2**-11
    assert largest_error_in_steps(measured) > 20


def test_formats_by_hand() -> None:
    values = np.array([0.0, 0.26, -0.26, 1.0, 500.0], np.float32)
    np.testing.assert_array_equal(INT8.quantized(values, np.float32(0.5)), [0, 1, -1, 2, 127])
    assert FP8.quantized(values, np.float32(1)).dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(FP8.rounded(values, np.float32(1)), [0, 0.25, -0.25, 1, 448])
    scale = scale_from_magnitude([0.0, 1.0, 100.0], 127.0)
    assert (scale > 0).all()
    np.testing.assert_array_equal(scale, scale.astype(np.float16))
