"""`VisionEncoder` on ONNX Runtime's CPU provider."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import BackendError, InputError, ManifestError, NotFiniteError
from mmvision_export.core.files import file_record
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.models.minimax_m3_vl.preprocess import batch_from_images
from mmvision_export.models.weights import WeightSource
from mmvision_export.runtime.backends import AUTO_BACKENDS
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, copy_of, grids, relative_l2, run_graph
from tests.support.errors import is_named, refused


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
    images = [
        Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in ((60, 90), (200, 56))
    ]
    together = runtime.encode_images(images)
    assert [len(tokens) for tokens in together] == [
        batch_from_images([image], runtime.preprocessor).grid.num_tokens for image in images
    ]
    for image, tokens in zip(images, together, strict=True):
        (alone,) = runtime.encode_images([image])
        assert relative_l2(tokens, alone) <= 2e-6
    assert relative_l2(*runtime.encode_images([images[0], images[0].rotate(180)])) > 0.01


def test_many_images_are_run_in_groups_that_change_nothing(
    runtime: VisionEncoder, exported: Path
) -> None:
    """On a CPU a batch is cut between images: masked attention costs its square."""
    grid = [(1, 20, 20), (1, 2, 2), (1, 30, 30), (1, 40, 40), (1, 8, 8)] * 2
    pixels, rows = batch(grid, HEAD_DIM_80)
    whole = run_graph(exported / "model.onnx", pixels, rows)
    np.testing.assert_allclose(runtime(pixels, rows), whole, rtol=0, atol=2e-5)


def test_anything_with_dlpack_is_taken(runtime: VisionEncoder) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    expected = runtime(pixels, rows)
    np.testing.assert_array_equal(
        runtime(torch.from_numpy(pixels), torch.from_numpy(rows)), expected
    )
    with refused(InputError, "Tensor", "CPU array"):
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
    ("pixels", "grid", "facts"),
    [
        (np.zeros((16, 1176), np.float32), [[1, 4, 5]], ["grid_thw row 0", "w", 2, 5]),
        (
            np.zeros((16, 1176), np.float32),
            [[1, 4, 6]],
            ["grid_thw", 24, "pixel_values", 16],
        ),
        (np.zeros((16, 1175), np.float32), [[1, 4, 4]], ["pixel_values", 1176, [16, 1175]]),
        (np.zeros((16, 1176)), [[1, 4, 4]], ["pixel_values", "float32", "float64"]),
        (np.full((16, 1176), np.nan, np.float32), [[1, 4, 4]], ["pixel_values", "row 0"]),
        ([], [[1, 4, 4]], ["pixel_values", "float32", "float64"]),
    ],
)
def test_bad_input(runtime: VisionEncoder, pixels: Any, grid: Any, facts: list[object]) -> None:
    with refused(InputError, *facts):
        runtime(pixels, grid)


def test_auto_says_what_was_passed_over(exported: Path) -> None:
    with VisionEncoder.open(exported) as encoder:
        assert encoder.info["backend"].startswith(("onnxruntime", "tensorrt"))
        if encoder.info["backend"] == "onnxruntime-cpu":
            before = AUTO_BACKENDS[: AUTO_BACKENDS.index("onnxruntime-cpu")]
            assert set(encoder.info["passed_over"]) == set(before)


def test_float16_directory(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="fp16"
    )
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(tmp_path / "m", backend="onnxruntime-cpu") as encoder:
        assert encoder(pixels, rows).dtype == np.float16


OVERFLOWING = 1


def overflowing(dtype: type[np.floating]) -> PackedBatch:
    """Three images, the second so bright that the patch embedding overflows."""
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    grid = PackedGrid(rows, HEAD_DIM_80.patches_per_token)
    pixels[grid.bounds[OVERFLOWING] : grid.bounds[OVERFLOWING + 1]] = 0.9 * float(
        np.finfo(dtype).max
    )
    return PackedBatch(pixels, grid)


def check_others_are_given(encoder: VisionEncoder, planted: PackedBatch) -> None:
    with pytest.raises(NotFiniteError) as caught:
        encoder(planted.pixel_values, planted.grid.rows)
    assert caught.value.images == [OVERFLOWING]
    assert is_named(f"image {OVERFLOWING}", str(caught.value))
    for image, embeds in enumerate(caught.value.image_embeds):
        if image == OVERFLOWING:
            assert embeds is None
            continue
        one = planted.images(slice(image, image + 1))
        alone = encoder(one.pixel_values, one.grid.rows)
        assert relative_l2(embeds, alone) <= (2e-6 if encoder.dtype == np.float32 else 2e-3)


def test_an_image_that_overflows_is_named_and_the_others_are_given(runtime: VisionEncoder) -> None:
    check_others_are_given(runtime, overflowing(np.float32))


def test_where_attention_is_masked_it_spoils_the_others_only_for_a_moment(tmp_path: Path) -> None:
    source = WeightSource(random_config=HEAD_DIM_80, seed=1)
    export_model_directory(source, tmp_path / "m", precision="fp16")
    planted = overflowing(np.float16)
    options: dict[str, Any] = {"backend": "onnxruntime-cpu"}
    with VisionEncoder.open(tmp_path / "m", refuse_non_finite=False, **options) as encoder:
        together = planted.grid.split(encoder(planted.pixel_values, planted.grid.rows))
        assert all(np.isnan(embeds).any() for embeds in together)  # what there is to mend
    with VisionEncoder.open(tmp_path / "m", **options) as encoder:
        check_others_are_given(encoder, planted)


def test_images_that_are_not_finite_can_be_none(
    runtime: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.vision_encoder.batch_from_sources",
        lambda images, config, **options: overflowing(np.float32),
    )
    images = [Image.new("RGB", (28, 28))] * 3
    found = runtime.encode_images(images, not_finite="none")
    assert [embeds is None for embeds in found] == [False, True, False]
    with pytest.raises(NotFiniteError):
        runtime.encode_images(images)
    with refused(InputError, "not_finite", "'ignore'"):
        runtime.encode_images(images, not_finite="ignore")  # type: ignore[call-overload]


def test_bfloat16_directory_is_refused_on_the_cpu(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="bf16"
    )
    with refused(BackendError, "bf16", "CPU"):
        VisionEncoder.open(tmp_path / "m", backend="onnxruntime-cpu")


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "auto"])
def test_damaged_directories(exported: Path, tmp_path: Path, backend: str) -> None:
    directory = copy_of(exported, tmp_path / "m")
    graph, data = directory / "model.onnx", directory / "model.onnx.data"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with refused(ManifestError, graph, "sha256"):
        VisionEncoder.open(directory, backend=backend)
    graph.write_bytes((exported / "model.onnx").read_bytes())
    data.write_bytes(data.read_bytes()[:-1])
    with refused(ManifestError, data, "bytes"):
        VisionEncoder.open(directory, backend=backend)
    data.unlink()
    with refused(ManifestError, data, reason="missing"):
        VisionEncoder.open(directory, backend=backend)


def test_unknown_backend_and_directory(exported: Path, tmp_path: Path) -> None:
    with refused(BackendError, "backend", "coreml"):
        VisionEncoder.open(exported, backend="coreml")
    with refused(ManifestError, tmp_path / "nothing", reason="missing"):
        VisionEncoder.open(tmp_path / "nothing")
    with refused(BackendError, ".engine"):
        VisionEncoder.open(exported / "model.onnx", backend="onnxruntime-cpu")


def test_malformed_preprocessor_config(exported: Path, tmp_path: Path) -> None:
    from mmvision_export.core.errors import ConfigError

    directory = copy_of(exported, tmp_path / "m")
    file = directory / "preprocessor_config.json"
    file.write_text('{"resample": 0}')
    manifest = Manifest.read(directory)
    manifest.files[file.name] = file_record(file)
    manifest.write(directory)
    with refused(ConfigError, file, "resample", 0):
        VisionEncoder.open(directory, backend="onnxruntime-cpu")


def test_importing_it_loads_no_package_of_the_build_machine() -> None:
    program = (
        "import sys; import mmvision_export; mmvision_export.VisionEncoder; import mmvision_export.run; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'polygraphy', 'typer', 'rich', 'onnxruntime') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == "[]"


def test_closing_twice_is_nothing_and_using_it_then_is_an_error(exported: Path) -> None:
    encoder = VisionEncoder.open(exported, backend="onnxruntime-cpu")
    encoder.close()
    encoder.close()
    with refused(BackendError, "encoder", "closed"):
        encoder(*batch(GRIDS["single"], HEAD_DIM_80))


def test_unknown_attribute_of_the_package() -> None:
    import mmvision_export

    with pytest.raises(AttributeError) as caught:
        mmvision_export.Encoder  # noqa: B018
    assert "'Encoder'" in str(caught.value)


def test_arrays_come_back_as_they_were_given(runtime: VisionEncoder) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    expected = runtime(pixels, rows)
    assert type(expected) is np.ndarray
    given = torch.from_numpy(pixels)
    out = runtime(given, torch.from_numpy(rows))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (15, 1175), (7, 600)])
def test_one_value_that_is_not_finite_is_named(
    runtime: VisionEncoder, value: float, place: tuple[int, int]
) -> None:
    pixels = np.zeros((16, 1176), np.float32)
    pixels[place] = value
    with refused(InputError, "pixel_values", f"row {place[0]}"):
        runtime(pixels, [[1, 4, 4]])


def test_the_largest_finite_values_are_finite() -> None:
    """The check sums; no sum of finite values may overflow."""
    from mmvision_export.models.minimax_m3_vl.packed_batch import checked_batch

    largest = np.full((4, 1176), np.finfo(np.float32).max)
    assert checked_batch(largest, [(1, 2, 2)], HEAD_DIM_80, np.float32).pixel_values is largest
    with refused(InputError, "pixel_values", 0, "float16"):
        checked_batch(largest, [(1, 2, 2)], HEAD_DIM_80, np.float16)


def test_threads_share_an_encoder(runtime: VisionEncoder) -> None:
    batches = [batch([(1, 2, 2 * n), (1, 4, 4)], HEAD_DIM_80, seed=n) for n in range(1, 6)]
    expected = [runtime(*each) for each in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: runtime(*batches[n % 5]), range(40)))
    for n, each in enumerate(found):
        assert relative_l2(each, expected[n % 5]) <= 1e-6


def test_device_arrays_and_streams_are_refused_where_they_cannot_be_used(
    runtime: VisionEncoder,
) -> None:
    class OnAGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("not asked for")

    pixels, rows = batch(GRIDS["single"], HEAD_DIM_80)
    with refused(BackendError, "onnxruntime-cpu", "CUDA device"):
        runtime(OnAGpu(), rows)
    with refused(BackendError, "onnxruntime-cpu", "CUDA stream"):
        runtime(pixels, rows, stream=7)


def random_batches_equal_runs_of_one_image(runtime: VisionEncoder, count: int) -> None:
    generator = np.random.default_rng(0)
    for seed in range(count):
        sizes = generator.integers(1, 5, (int(generator.integers(2, 6)), 3))
        pixels, rows = batch(
            [(int(t), 2 * int(h), 2 * int(w)) for t, h, w in sizes], HEAD_DIM_80, seed
        )
        together = runtime(pixels, rows)
        bounds = np.cumsum([0, *rows.prod(axis=1)])
        alone = [
            runtime(pixels[a:b], rows[i : i + 1])
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        assert relative_l2(together, np.concatenate(alone)) <= 1e-6, rows.tolist()


def test_random_batches_equal_runs_of_one_image(runtime: VisionEncoder) -> None:
    random_batches_equal_runs_of_one_image(runtime, 50)


@pytest.mark.slow
def test_a_thousand_random_batches_equal_runs_of_one_image(runtime: VisionEncoder) -> None:
    random_batches_equal_runs_of_one_image(runtime, 1000)


@pytest.mark.slow
def test_memory_is_flat_over_many_calls(runtime: VisionEncoder) -> None:
    """Resident memory after 10,000 calls is what it was after 1,000."""
    resource = psutil.Process()
    batches = [batch([(1, 2, 2 * n)], HEAD_DIM_80, seed=n) for n in range(1, 6)]
    after = []
    for call in range(10_000):
        runtime(*batches[call % 5])
        if call in (999, 9_999):
            after.append(resource.memory_info().rss)
    assert after[1] - after[0] < 4 << 20  # 400 bytes a call, less than the smallest of its arrays


@pytest.mark.slow
def test_with_the_cpu_extra_only(exported: Path, tmp_path: Path) -> None:
    """An environment of `pip install '.[cpu]'` runs `python -m mmvision_export.run`."""
    environment, root = tmp_path / "venv", Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    constraints = str(root / "constraints.txt")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
        f"{root}[cpu]",
    ]
    subprocess.run(install, check=True, env=clean)
    command = [
        python,
        "-m",
        "mmvision_export.run",
        "--model",
        str(exported),
        "--output",
        str(tmp_path / "out.npy"),
    ]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=clean
    )
    assert json.loads(result.stdout)["backend"] == "onnxruntime-cpu"
    assert np.load(tmp_path / "out.npy").shape == (256, 96)
    absent = [python, "-c", "import torch"]
    assert (
        subprocess.run(absent, check=False, capture_output=True, cwd=tmp_path, env=clean).returncode
        == 1
    )


def test_torchs_other_types_are_taken(runtime: VisionEncoder) -> None:
    """bfloat16 and float16 are exact in float32."""
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    for dtype in (torch.bfloat16, torch.float16):
        given = torch.from_numpy(pixels).to(dtype)
        found = runtime(given, torch.from_numpy(rows))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found, runtime(given.float().numpy(), rows))
    with refused(InputError, "gradient"):
        runtime(torch.from_numpy(pixels).requires_grad_(), rows)


def test_one_image_and_paths_are_taken(runtime: VisionEncoder, tmp_path: Path) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "x.png")
    (expected,) = runtime.encode_images([Image.fromarray(levels)])
    for image in (tmp_path / "x.png", [str(tmp_path / "x.png")], levels, [levels]):
        (found,) = runtime.encode_images(image)
        np.testing.assert_array_equal(found, expected)


def test_what_it_runs_is_shown(runtime: VisionEncoder) -> None:
    import mmvision_export

    assert "model.cpu.onnx: onnxruntime-cpu, fp32" in repr(runtime)
    assert "VisionEncoder" in dir(mmvision_export)
