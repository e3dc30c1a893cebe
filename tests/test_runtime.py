"""`VisionEncoder` on ONNX Runtime's CPU provider."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.backends import BACKENDS
from mmvision_export.encoder import VisionEncoderModule
from mmvision_export.errors import BackendError, InputError, ManifestError
from mmvision_export.onnx_export import export_model_directory
from mmvision_export.preprocess import patches_from_images
from mmvision_export.weights import WeightSource
from tests.configs import GRIDS, HEAD_DIM_80, batch, copy_of, grids, relative_l2, run_graph


@pytest.fixture(scope="module")
def runtime(exported: Path) -> Any:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        yield encoder


@settings(max_examples=20)
@given(grid=grids())
def test_matches_pytorch(
    runtime: VisionEncoder, encoder: VisionEncoderModule, grid: list[tuple[int, int, int]]
) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
    assert relative_l2(runtime(pixels, rows), expected) <= 2e-6


def test_images_of_different_size_come_back_apart(runtime: VisionEncoder) -> None:
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((60, 90), (200, 56))]
    together = runtime.encode_images(images)
    assert [len(tokens) for tokens in together] == [
        patches_from_images([image], runtime.preprocessor)[1].prod() // 4 for image in images
    ]
    for image, tokens in zip(images, together, strict=True):
        (alone,) = runtime.encode_images([image])
        assert relative_l2(tokens, alone) <= 2e-6
    assert relative_l2(*runtime.encode_images([images[0], images[0].rotate(180)])) > 0.01


def test_many_images_are_run_in_groups_that_change_nothing(runtime: VisionEncoder, exported: Path) -> None:
    """On a CPU a batch is cut between images, since masked attention costs the square of what it is given at once."""
    grid = [(1, 20, 20), (1, 2, 2), (1, 30, 30), (1, 40, 40), (1, 8, 8)] * 2
    pixels, rows = batch(grid, HEAD_DIM_80)
    whole = run_graph(exported / "model.onnx", pixels, rows)
    np.testing.assert_allclose(runtime(pixels, rows), whole, rtol=0, atol=2e-5)


def test_anything_with_dlpack_is_taken(runtime: VisionEncoder) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    expected = runtime(pixels, rows)
    np.testing.assert_array_equal(runtime(torch.from_numpy(pixels), torch.from_numpy(rows)), expected)
    with pytest.raises(InputError, match="a Tensor cannot be read as a CPU array"):
        runtime(torch.from_numpy(pixels).to("meta"), rows)


def test_lists_and_slices_are_taken(runtime: VisionEncoder) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    wide = np.repeat(pixels, 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous
    np.testing.assert_array_equal(runtime(wide, rows.tolist()), runtime(pixels, rows))


def test_info(runtime: VisionEncoder, exported: Path) -> None:
    assert runtime.info["backend"] == "onnxruntime-cpu"
    assert runtime.info["model"] == str(exported)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        (np.zeros((16, 1176), np.float32), [[1, 4, 5]], "must be a multiple of 2"),
        (np.zeros((16, 1176), np.float32), [[1, 4, 6]], "adds up to 24 patches, but pixel_values has 16 rows"),
        (np.zeros((16, 1175), np.float32), [[1, 4, 4]], "must have shape"),
        (np.zeros((16, 1176)), [[1, 4, 4]], "must be float32"),
        (np.full((16, 1176), np.nan, np.float32), [[1, 4, 4]], "not finite"),
        ([], [[1, 4, 4]], "must be float32"),
    ],
)
def test_bad_input(runtime: VisionEncoder, pixels: Any, grid: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime(pixels, grid)


def test_auto_says_what_was_passed_over(exported: Path) -> None:
    with VisionEncoder.open(exported) as encoder:
        assert encoder.info["backend"].startswith(("onnxruntime", "tensorrt"))
        if encoder.info["backend"] == "onnxruntime-cpu":
            assert set(encoder.info["passed_over"]) == set(BACKENDS) - {"onnxruntime-cpu"}


def test_float16_directory(tmp_path: Path) -> None:
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="fp16")
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(tmp_path / "m", backend="onnxruntime-cpu") as encoder:
        assert encoder(pixels, rows).dtype == np.float16


def test_bfloat16_directory_is_refused_on_the_cpu(tmp_path: Path) -> None:
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="bf16")
    with pytest.raises(BackendError, match="no bf16 operators"):
        VisionEncoder.open(tmp_path / "m", backend="onnxruntime-cpu")


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "auto"])
def test_damaged_directories(exported: Path, tmp_path: Path, backend: str) -> None:
    directory = copy_of(exported, tmp_path / "m")
    graph, data = directory / "model.onnx", directory / "model.onnx.data"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError, match=r"model\.onnx has sha256"):
        VisionEncoder.open(directory, backend=backend)
    graph.write_bytes((exported / "model.onnx").read_bytes())
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="the copy is incomplete|bytes, the manifest says"):
        VisionEncoder.open(directory, backend=backend)
    data.unlink()
    with pytest.raises(ManifestError, match=r"model\.onnx\.data is missing"):
        VisionEncoder.open(directory, backend=backend)


def test_unknown_backend_and_directory(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no such backend: openvino"):
        VisionEncoder.open(exported, backend="openvino")
    with pytest.raises(ManifestError, match="no such model directory"):
        VisionEncoder.open(tmp_path / "nothing")
    with pytest.raises(BackendError, match="neither a model directory nor an .engine"):
        VisionEncoder.open(exported / "model.onnx", backend="onnxruntime-cpu")


def test_malformed_preprocessor_config(exported: Path, tmp_path: Path) -> None:
    from mmvision_export.errors import ConfigError

    directory = copy_of(exported, tmp_path / "m")
    (directory / "preprocessor_config.json").write_text('{"resample": 0}')
    with pytest.raises(ConfigError, match="resample"):
        VisionEncoder.open(directory, backend="onnxruntime-cpu")


def test_importing_it_loads_no_package_of_the_build_machine() -> None:
    program = (
        "import sys; import mmvision_export; mmvision_export.VisionEncoder; import mmvision_export.run; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'polygraphy', 'typer', 'rich', 'onnxruntime') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_closing_twice_is_nothing_and_using_it_then_is_an_error(exported: Path) -> None:
    encoder = VisionEncoder.open(exported, backend="onnxruntime-cpu")
    encoder.close()
    encoder.close()
    with pytest.raises(BackendError, match="closed"):
        encoder(*batch(GRIDS["single"], HEAD_DIM_80))


def test_unknown_attribute_of_the_package() -> None:
    import mmvision_export

    with pytest.raises(AttributeError, match="has no attribute 'Encoder'"):
        mmvision_export.Encoder  # noqa: B018
