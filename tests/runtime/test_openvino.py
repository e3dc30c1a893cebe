"""`VisionEncoder` on OpenVINO: float32 on every CPU, bfloat16 where the CPU has it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import OPENVINO_GRAPH, UNIFORM_GRAPH, Manifest
from mmvision_export.core.errors import BackendError, ManifestError, NotFiniteError
from mmvision_export.core.install import install_command
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.costs import FLOOR_PATCHES
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, PackedGrid
from mmvision_export.models.weights import WeightSource
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends import openvino as module
from mmvision_export.runtime.backends.openvino import (
    OpenVinoBackend,
    cpu_capabilities,
    import_openvino,
)
from tests.support.configs import (
    GRIDS,
    HEAD_DIM_64,
    HEAD_DIM_80,
    batch,
    copy_of,
    grids,
    relative_l2,
)
from tests.support.slots import with_openvino_graph

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def runtime(exported: Path) -> Any:
    with VisionEncoder.open(exported, backend="openvino", threads=2) as encoder:
        yield encoder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported OpenVINO, where it is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)


@settings(max_examples=20)
@given(grid=grids())
def test_matches_pytorch(
    runtime: VisionEncoder, encoder: VisionEncoderModule, grid: list[tuple[int, int, int]]
) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
    # Its kernels and PyTorch's each measure 1.3e-6 at most against float64.
    assert relative_l2(runtime(pixels, rows), expected) <= 4e-6


def test_the_comparison_can_fail(runtime: VisionEncoder) -> None:
    """Attention across the boundary of two images is seen."""
    pixels, rows = batch(GRIDS["two of different size"], HEAD_DIM_80)
    assert relative_l2(runtime(pixels, np.array([[1, 10, 4]])), runtime(pixels, rows)) > 1e-3


@pytest.fixture(scope="module")
def older(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as it was before there was a graph for slots."""
    return with_openvino_graph(exported, tmp_path_factory.mktemp("older") / "m", OPENVINO_GRAPH)


@pytest.fixture(scope="module")
def slotted(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a graph under the name of the one for slots, of which it takes the batches."""
    directory = with_openvino_graph(
        exported, tmp_path_factory.mktemp("slotted") / "m", UNIFORM_GRAPH
    )
    with VisionEncoder.open(directory, backend="openvino", threads=2) as encoder:
        yield encoder


@settings(max_examples=15)
@given(grid=grids())
def test_images_in_slots_match_pytorch(
    slotted: VisionEncoder, encoder: VisionEncoderModule, grid: list[tuple[int, int, int]]
) -> None:
    assert slotted.info["graph"] == UNIFORM_GRAPH
    assert "the square of a slot" in slotted.info["splitting"]
    pixels, rows = batch(grid, HEAD_DIM_80)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
    assert relative_l2(slotted(pixels, rows), expected) <= 4e-6


@pytest.mark.parametrize("graph", [OPENVINO_GRAPH, UNIFORM_GRAPH])
def test_an_image_that_overflows_spoils_no_other(exported: Path, older: Path, graph: str) -> None:
    """Masked, it gives others finite embeddings that are wrong: they are computed again."""
    directory = older if graph == OPENVINO_GRAPH else exported
    pixels, rows = batch([(1, 4, 4)] * 3, HEAD_DIM_80)
    with VisionEncoder.open(directory, backend="openvino", threads=2) as encoder:
        assert encoder.info["graph"] == graph
        expected = encoder(pixels, rows)
        pixels[16:32] = 0.9 * float(np.finfo(np.float32).max)
        with pytest.raises(NotFiniteError) as caught:
            encoder(pixels, rows)
    assert caught.value.images == [1]
    for image in (0, 2):
        tokens = slice(4 * image, 4 * image + 4)
        assert relative_l2(caught.value.image_embeds[image], expected[tokens]) <= 4e-6


def test_a_masked_neighbour_that_overflows_gives_wrong_numbers(older: Path) -> None:
    """What the test above has to mend. Should OpenVINO give NaN some day, nothing is lost."""
    pixels, rows = batch([(1, 4, 4)] * 3, HEAD_DIM_80)
    options: dict[str, Any] = {"backend": "openvino", "refuse_non_finite": False}
    with VisionEncoder.open(older, **options) as encoder:
        expected = encoder(pixels, rows)
        pixels[16:32] = 0.9 * float(np.finfo(np.float32).max)
        assert not relative_l2(encoder(pixels, rows)[:4], expected[:4]) < 1e-3


def test_a_batch_is_cut_between_images(older: Path) -> None:
    """Masked attention would cost the square of the batch: only what is small is joined."""
    backend = OpenVinoBackend.open(older, BackendOptions(threads=2))
    assert "the square of a launch" in str(backend.info.splitting)
    sizes = [(1, 20, 20), (1, 2, 2), (1, 2, 2), (1, 16, 16), (1, 40, 40), (1, 8, 8)]
    rows = np.array(sizes)
    planner: Any = backend._planner
    launches = planner(PackedGrid(rows, 4))
    assert len(planner(PackedGrid(np.array([(1, 16, 16)] * 16), 4))) == 16
    patches = rows.prod(axis=1)
    for launch in launches:
        together = patches[launch.images]
        assert (together >= FLOOR_PATCHES).sum() <= 1
    assert len(launches) < len(sizes)
    pixels, _ = batch(sizes, HEAD_DIM_80)
    packed = PackedBatch(pixels, PackedGrid(rows, 4))
    whole = backend.run(packed)
    alone = [backend.run(packed.images(slice(index, index + 1))) for index in range(len(rows))]
    backend.close()
    assert relative_l2(whole, np.concatenate(alone)) <= 4e-6


def test_threads_take_turns(runtime: VisionEncoder) -> None:
    """Calls at once give what each gives alone, though all of them read one request's output."""
    batches = [batch(grid, HEAD_DIM_80) for grid in GRIDS.values()] * 4
    alone = [runtime(*each) for each in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: runtime(*each), batches))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_results_and_inputs_stay_the_callers(runtime: VisionEncoder) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    first = runtime(pixels, rows)
    kept = first.copy()
    pixels.flags.writeable = False
    np.testing.assert_array_equal(runtime(pixels, rows), kept)
    runtime(np.zeros_like(pixels), rows)
    np.testing.assert_array_equal(first, kept)


def test_info(runtime: VisionEncoder) -> None:
    info = runtime.info
    assert info["backend"] == "openvino"
    assert info["graph"] in (UNIFORM_GRAPH, OPENVINO_GRAPH)
    assert (info["precision"], info["threads"]) == ("fp32", 2)


def test_float32_is_asked_for(runtime: VisionEncoder) -> None:
    """Where a CPU has bfloat16, OpenVINO would take it by itself."""
    request = runtime._backend._request  # type: ignore[attr-defined]
    hint = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert hint == import_openvino().Type.f32


def test_bf16_where_the_cpu_has_it(exported: Path, runtime: VisionEncoder) -> None:
    if "BF16" not in cpu_capabilities(import_openvino().Core()):
        with pytest.raises(BackendError) as refused:
            VisionEncoder.open(exported, backend="openvino", precision="bf16")
        assert "FP32" in str(refused.value)
        assert refused.value.hint is not None
        return
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(exported, backend="openvino", precision="bf16") as encoder:
        assert encoder.info["precision"] == "bf16"
        # bfloat16 keeps 8 bits; a result in float32 would be a thousand times closer.
        assert 1e-4 < relative_l2(encoder(pixels, rows), runtime(pixels, rows)) < 3e-2


def test_bf16_that_openvino_leaves_out_is_refused(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without it, it computes in float32 and says nothing."""
    if "BF16" in cpu_capabilities(import_openvino().Core()):
        pytest.skip("this CPU has bfloat16")
    monkeypatch.setattr(module, "cpu_capabilities", lambda core: ("BF16",))
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, backend="openvino", precision="bf16")
    assert "float32" in str(refused.value)


def test_precisions_that_there_are_not(exported: Path) -> None:
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, backend="openvino", precision="fp16")
    assert "fp16" in str(refused.value)
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, backend="onnxruntime-cpu", precision="bf16")
    assert "onnxruntime-cpu" in str(refused.value)


def test_auto_is_the_backend_that_takes_the_precision(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VisionEncoder.open(exported, precision="fp32") as encoder:
        assert encoder.info["backend"] == "openvino"
    monkeypatch.setattr(module, "cpu_capabilities", lambda core: ())
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, precision="bf16")
    assert "openvino: " in str(refused.value)


def test_not_installed(exported: Path, fresh: None) -> None:
    with pytest.raises(BackendError) as refused:
        VisionEncoder.open(exported, backend="openvino")
    assert refused.value.hint == install_command("openvino")
    with VisionEncoder.open(exported) as encoder:  # auto does without
        assert encoder.info["backend"] != "openvino"


def test_the_wrong_graphs(older: Path, tmp_path: Path) -> None:
    source = WeightSource(random_config=HEAD_DIM_64, seed=1)
    export_model_directory(source, tmp_path / "half", precision="fp16")
    with pytest.raises(BackendError) as half:
        VisionEncoder.open(tmp_path / "half", backend="openvino")
    assert "fp16" in str(half.value)

    oldest = copy_of(older, tmp_path / "oldest")
    manifest = Manifest.read(oldest)
    del manifest.files[OPENVINO_GRAPH]
    manifest.write(oldest)
    (oldest / OPENVINO_GRAPH).unlink()
    with pytest.raises(ManifestError) as missing:
        VisionEncoder.open(oldest, backend="openvino")
    assert OPENVINO_GRAPH in str(missing.value)
    with VisionEncoder.open(oldest, backend="onnxruntime-cpu"):
        pass

    damaged = copy_of(older, tmp_path / "damaged")
    graph = damaged / OPENVINO_GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError) as changed:
        VisionEncoder.open(damaged, backend="openvino")
    assert OPENVINO_GRAPH in str(changed.value)


def test_closed(exported: Path) -> None:
    encoder = VisionEncoder.open(exported, backend="openvino")
    encoder.close()
    encoder.close()
    with pytest.raises(BackendError):
        encoder(*batch(GRIDS["three"], HEAD_DIM_80))
