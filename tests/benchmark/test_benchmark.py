"""`mmvision benchmark`: what is counted, who is measured, what is kept. No test asserts a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.benchmark import measure as measuring
from mmvision_export.benchmark.gpu_roofline import (
    GPUS,
    cost_markdown,
    gpu_markdown,
    hours_per_million,
    least_seconds,
)
from mmvision_export.benchmark.measure import measure
from mmvision_export.benchmark.peers import peer_from_encoder
from mmvision_export.benchmark.report import page_from_result
from mmvision_export.benchmark.result import Measurement, Result
from mmvision_export.benchmark.run import run_benchmark, sides_from
from mmvision_export.benchmark.sides import BF16, PEERS, cpu_has_bf16, label_of, without_precision
from mmvision_export.benchmark.workloads import (
    QUICK,
    STANDARD,
    Work,
    Workload,
    work_of,
    workloads_for,
)
from mmvision_export.core.errors import BenchmarkError, InputError, OutputError
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.runtime.backends import BACKENDS
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, relative_l2
from tests.support.errors import refused
from tests.support.notes import Notes

TINY = Workload("two", ("patches", "images"), ((1, 4, 4), (1, 2, 6)))


def test_flops_are_those_of_the_graphs_products(exported: Path) -> None:
    """An independent count: every Gemm of the exported graph, by the shape of its weight."""
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    patches, tokens = TINY.patches, TINY.patches // 4
    flops = sum(
        2.0
        * math.prod(shapes[node.input[1]])
        * (tokens if node.name.startswith("patch_merge") else patches)
        for node in graph.node
        if node.op_type == "Gemm"
    )
    work = work_of(HEAD_DIM_80, TINY.grid)
    assert sum(item.flops for name, item in work.items() if name != "attention") == flops
    layers, width = HEAD_DIM_80.num_hidden_layers, HEAD_DIM_80.hidden_size
    assert work["attention"].flops == layers * 2 * 2 * width * (16**2 + 12**2)
    assert work_of(HEAD_DIM_80, TINY.grid, bytes_per_value=2)["MLP"].bytes == work["MLP"].bytes / 2


def test_workloads_are_valid_and_named_once() -> None:
    for workloads in (QUICK, STANDARD):
        assert len({workload.name for workload in workloads}) == len(workloads)
        for t, h, w in (row for workload in workloads for row in workload.grid):
            assert t <= 4
            assert h % 2 == w % 2 == 0
    assert max(w.patches for w in STANDARD) == 16384
    with refused(InputError, "workloads", "huge"):
        workloads_for("huge")


@pytest.mark.parametrize(
    "peer", [name for name in PEERS if name != "torch-compile" and not name.endswith(BF16)]
)
def test_peers_are_the_same_function(peer: str, encoder: VisionEncoderModule) -> None:
    pytest.importorskip("nemo_automodel" if peer == "nemo" else "torch")
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels), torch.from_numpy(rows)).numpy()
        out = peer_from_encoder(peer, encoder)(
            torch.from_numpy(pixels), torch.from_numpy(rows)
        ).numpy()
    assert relative_l2(out, expected) <= 1e-5


def test_labels_tell_sides_apart() -> None:
    names = [
        *PEERS,
        *BACKENDS,
        "openvino-bf16",
        "onnxruntime-cpu:model.onnx",
        "onnxruntime-cpu:plain",
    ]
    assert len({label_of(name) for name in names}) == len(names)
    assert label_of("onnxruntime-cpu:model.cpu-int8.onnx") == "ONNX Runtime INT8"
    assert without_precision("torch-eager-bf16") == ("torch-eager", "bf16")
    assert without_precision("torch-eager") == ("torch-eager", None)


def run(directory: Path, sides: list[str], kept: list[dict[str, Any]], **options: Any) -> Result:
    settings = {"threads": 1, "repeats": 2, "seconds_per_workload": 60.0, **options}
    return measure(
        directory, sides, [TINY], keep=lambda result: kept.append(result.to_dict()), **settings
    )


@pytest.fixture(scope="module")
def result(exported: Path) -> Result:
    return run(exported, ["onnxruntime-cpu", "onnxruntime-cpu:model.onnx", "torch-eager"], [])


def test_every_side_is_measured_in_every_round(result: Result) -> None:
    assert [m.side for m in result.measurements] == [
        "onnxruntime-cpu",
        "onnxruntime-cpu:model.onnx",
        "torch-eager",
    ]
    for m in result.measurements:
        assert len(m.seconds) == 2
        assert m.warm
        assert min(m.seconds) > 0
        assert (m.peak_bytes or 0) > 1e7
        assert m.relative_l2 <= 1e-5
    assert result.measurements[0].relative_l2 == 0
    assert result.gemm_peak_gflops == max(result.gemm_gflops.values()) > 0
    assert set(result.gemm_gflops) == {"ONNX Runtime", "PyTorch"}
    row = json.loads(json.dumps(result.to_dict(), allow_nan=False))["measurements"][0]
    assert row["patches_per_s"] == pytest.approx(28 / row["median_s"])
    assert row["image_tokens_per_s"] == pytest.approx(7 / row["median_s"])
    assert row["share_of_gemm_peak"] == pytest.approx(row["gflops"] / result.gemm_peak_gflops)


def test_bf16_beside_float32(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured with what it loses; where it is emulated, once, and on small batches."""
    sides = ["openvino", "torch-eager-bf16", "transformers-sdpa-bf16"]
    result = run(exported, sides, [])
    rows = {m.side: m for m in result.measurements}
    assert set(rows) == set(sides)
    assert set(result.gemm_gflops) == {"OpenVINO", "PyTorch"}
    assert result.emulated() == ([] if cpu_has_bf16() else sides[1:])
    for side in sides[1:]:
        assert result.sides[side]["precision"] == "bf16"
        assert 0.999 < rows[side].min_cosine < 0.999999
        assert 1e-4 < rows[side].relative_l2 < 3e-2  # and float32 would be below 1e-5
        assert len(rows[side].seconds) == (2 if cpu_has_bf16() else 1)
        assert result.ratio(side, "two") is not None
    page = page_from_result(result, plots="x")
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    assert "| OpenVINO fp32 |" in page
    assert f"| PyTorch SDPA bf16 | {rows['torch-eager-bf16'].min_cosine:.6f} |" in page

    if not cpu_has_bf16():
        monkeypatch.setattr(measuring, "EMULATED_MAX_PATCHES", 27)
        result = run(exported, sides[:2], [])
        assert result.skipped == ["torch-eager-bf16: two"]
        assert "emulates them" in page_from_result(result, plots="x")


def test_another_function_in_bf16_is_refused(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: bfloat16 is not float32 to the last bit."""
    monkeypatch.setitem(measuring._MIN_COSINE, "bf16", 1.0)
    with pytest.raises(BenchmarkError) as refused:
        run(exported, ["onnxruntime-cpu", "torch-eager-bf16"], [])
    assert "torch-eager-bf16" in str(refused.value)


@pytest.mark.slow
def test_a_side_in_bf16_may_be_first(exported: Path) -> None:
    """The others are still held to the first in float32."""
    result = run(exported, ["torch-eager-bf16", "onnxruntime-cpu", "openvino"], [])
    distances = [m.relative_l2 for m in result.measurements]
    assert distances[0] > 1e-4
    assert distances[1] == 0
    assert distances[2] < 1e-5


def test_a_ratio_is_within_a_round() -> None:
    def of(side: str, seconds: list[float]) -> Measurement:
        return Measurement(side, "two", seconds, True, 0.0, 0.0, 0, 0, 0.0, 1.0, None)

    # The machine is ten times slower in the second round; the ratio does not see it.
    rows = [of("a", [1.0, 10.0, 1.0]), of("b", [2.0, 20.0, 2.0])]
    result = Result({}, {}, 1, {"a": {}, "b": {}}, {"a": 1.0}, [TINY], rows, [])
    assert result.ratio("b", "two") == 2.0
    assert result.ratio("c", "two") is None
    # A side in fewer rounds has been in the first of them.
    rows = [of("a", [1.0, 10.0, 1.0]), of("b", [3.0])]
    assert (
        Result({}, {}, 1, {"a": {}, "b": {}}, {"a": 1.0}, [TINY], rows, []).ratio("b", "two") == 3
    )


def test_the_first_round_counts_when_there_is_time_for_no_other(exported: Path) -> None:
    result = run(exported, ["onnxruntime-cpu"], [], seconds_per_workload=0.0)
    assert len(result.measurements[0].seconds) == 1
    assert not result.measurements[0].warm


def test_another_function_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: no two float32 implementations agree to the last bit."""
    monkeypatch.setattr(measuring, "_MAX_RELATIVE_L2", 0.0)
    kept: list[dict[str, Any]] = []
    with refused(BenchmarkError, "torch-eager", "onnxruntime-cpu", "two"):
        run(exported, ["onnxruntime-cpu", "torch-eager"], kept)
    assert not kept


def test_a_dense_side_is_left_out_where_it_would_not_fit(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measuring.MAX_PATCHES, "torch-eager", 27)
    result = run(exported, ["onnxruntime-cpu", "torch-eager"], [])
    assert [m.side for m in result.measurements] == ["onnxruntime-cpu"]
    assert result.skipped == ["torch-eager: two"]


@pytest.mark.slow
def test_a_large_batch_has_a_process_of_its_own(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "FRESH_PATCHES", 28)
    result = run(exported, ["onnxruntime-cpu", "torch-eager"], [])
    assert [len(m.seconds) for m in result.measurements] == [2, 2]
    assert result.measurements[0].above_bytes > 0
    assert all(m.relative_l2 <= 1e-5 for m in result.measurements)


def test_what_has_no_memory_is_left_out_with_what_it_said(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring._Side.ask

    def ask(side: Any, **request: Any) -> dict[str, Any]:
        if request["do"] == "run" and side.name == "onnxruntime-cpu:model.onnx":
            return {"refused": "image 0 needs 40 GB"}
        return asked(side, **request)

    monkeypatch.setattr(measuring._Side, "ask", ask)
    result = run(exported, ["onnxruntime-cpu", "onnxruntime-cpu:model.onnx"], [])
    assert [m.side for m in result.measurements] == ["onnxruntime-cpu"]
    assert result.refused == {"onnxruntime-cpu:model.onnx: two": "image 0 needs 40 GB"}
    page = page_from_result(result, plots="x")
    assert "ONNX Runtime portable graph fp32 refused the workload" in page
    assert "* two: image 0 needs 40 GB." in page


def test_a_side_that_fails_is_named(exported: Path) -> None:
    with refused(BenchmarkError, "onnxruntime-cuda", "CUDAExecutionProvider"):
        run(exported, ["onnxruntime-cuda"], [])
    with refused(BenchmarkError, "side", "torch-eager, torch-eager"):
        run(exported, ["torch-eager", "torch-eager"], [])


def test_sides(exported: Path) -> None:
    manifest = Manifest.read(exported)

    def sides(backend: str, precision: str = "fp32", peer: str = "nemo") -> list[str]:
        return sides_from(manifest, backends=[backend], precisions=[precision], peers=[peer])

    assert sides("onnxruntime-cpu:model.onnx") == ["onnxruntime-cpu:model.onnx", "nemo"]
    assert sides("openvino") == ["openvino", "nemo"]
    in_bf16 = ["openvino-bf16", "torch-compile-bf16"]
    assert sides(in_bf16[0], peer=in_bf16[1]) == in_bf16
    for wrong in ("coreml", "onnxruntime-cpu-bf16", "openvino-bf16:model.onnx"):
        with refused(BenchmarkError, "backend", wrong.partition(":")[0]):
            sides(wrong)
    with refused(BenchmarkError, "peer", "vllm"):
        sides("onnxruntime-cpu", peer="vllm")
    with refused(BenchmarkError, "onnxruntime-cpu", "graph", "model.onnx"):
        sides("onnxruntime-cpu:other.onnx")
    with refused(BenchmarkError, "model.cpu-int8.onnx"):
        sides("onnxruntime-cpu", precision="int8")
    with refused(BenchmarkError, "fp32", "fp16"):
        sides("onnxruntime-cpu", precision="fp16")


def test_gpu_roofline() -> None:
    """One GPU by hand: bound by arithmetic, then by memory."""
    gpu = GPUS[-1]
    assert least_seconds({"x": Work(gpu.flops_per_s * 2, 1.0)}, gpu) == 2
    assert least_seconds({"x": Work(1.0, gpu.bytes_per_s * 3)}, gpu) == 3
    # By hand: an H100 at half of its peak, 51.3 TFLOP a photograph.
    hours = hours_per_million((1, 96, 144), next(gpu for gpu in GPUS if gpu.name == "H100 SXM"))
    assert hours == pytest.approx(51.3e12 / (0.5 * 989.4e12) * 1e6 / 3600, rel=1e-2)
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for table in (cost_markdown(), gpu_markdown()):
        assert table in page


def test_the_command_refuses_and_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mmvision_export.cli.entry",
        "benchmark",
        "--model",
        str(exported),
    ]
    done = subprocess.run(
        [*command, "--against", "vllm", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: no such peer: vllm" in done.stderr
    assert "hint: choose from: transformers-eager" in done.stderr
    assert not list(tmp_path.iterdir())


def benchmark(directory: Path, output: Path, **options: Any) -> tuple[Result, Path]:
    return run_benchmark(
        directory,
        backends=["onnxruntime-cpu"],
        precisions=["fp32"],
        peers=[],
        workloads="quick",
        threads=1,
        repeats=1,
        seconds_per_workload=0.0,
        output=output,
        **{"page": None, **options},
    )


def test_nothing_is_replaced_unasked(exported: Path, tmp_path: Path) -> None:
    """Before anything is measured."""
    (tmp_path / "results.json").write_text("mine")
    with refused(OutputError, tmp_path / "results.json", "already exists"):
        benchmark(exported, tmp_path)
    page = tmp_path / "page.md"
    page.write_text("mine")
    with refused(OutputError, page, "already exists"):
        benchmark(exported, tmp_path / "new", page=page)
    with refused(OutputError, ".md", "bench.txt"):
        benchmark(exported, tmp_path / "new", page=Path("bench.txt"), force=True)
    assert (tmp_path / "results.json").read_text() == page.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_an_interrupt_says_what_is_kept(
    exported: Path, tmp_path: Path, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, keep: Callable[[Result], None], **__: object) -> Result:
        keep(result)
        raise KeyboardInterrupt

    monkeypatch.setattr("mmvision_export.benchmark.run.measure", interrupted)
    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        benchmark(exported, tmp_path, progress=notes)
    (note,) = notes.notes
    assert "1 workload" in note
    assert str(tmp_path / "results.json") in note
    assert (tmp_path / "results.json").exists()
