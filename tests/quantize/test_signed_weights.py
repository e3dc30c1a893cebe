"""The graph of `cpu-int8` for processors with VNNI: the same integers, and never on another processor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.graph_variants import CPU_INT8_GRAPH, VNNI_GRAPH
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.verdicts import content_sha256
from mmvision_export.core import processor
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.files import file_record
from mmvision_export.core.processor import cpu_has_vnni, processor_flags
from mmvision_export.core.progress import Progress
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.parity import candidates
from mmvision_export.parity.graphs import graphs_from_directory
from mmvision_export.quantize.quantize import quantize
from mmvision_export.quantize.statistics import run
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused
from tests.support.lowered import run_model

BATCHES = [sample_batch(((1, 6, 7), (1, 3, 5)), HEAD_DIM_80, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def quantized(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_of(exported, tmp_path_factory.mktemp("signed") / "m")
    quantize(
        directory,
        Manifest.read(directory),
        "cpu-int8",
        calibration=BATCHES[:1],
        held_out=BATCHES[1:],
        min_cosine=0.99,
    )
    return directory


def pretend(monkeypatch: pytest.MonkeyPatch, has_vnni: bool) -> None:
    flags = frozenset({"avx512_vnni"} if has_vnni else ())
    monkeypatch.setattr(processor, "processor_flags", lambda: flags)


def integer_weights(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for value in model.graph.initializers.values()
        if value.dtype == ir.DataType.UINT8 and value.shape is not None and len(value.shape) == 2
    ]


def test_each_weight_is_128_less(quantized: Path) -> None:
    """On any processor, as it computes the weights alone."""
    pixels, grid = BATCHES[0]
    model = ir.load(quantized / VNNI_GRAPH)
    signed = [node.outputs[0] for node in model.graph if (node.name or "").endswith("weight_int8")]
    weights = integer_weights(ir.load(quantized / CPU_INT8_GRAPH))
    assert len(signed) == len(weights) == 6 * HEAD_DIM_80.num_hidden_layers + 5
    for value, weight in zip(signed, weights, strict=True):
        value.shape = weight.shape
        model.graph.outputs.append(value)
    results = run_model(model, quantized, pixel_values=pixels, grid_thw=grid)[1:]
    named = {str(value.name): result for value, result in zip(signed, results, strict=True)}
    for weight in weights:
        assert weight.const_value is not None
        stored = weight.const_value.numpy()
        made = named[f"{str(weight.name).removesuffix('_uint8')}_int8"]
        assert made.dtype == np.int8
        np.testing.assert_array_equal(made, stored.astype(np.int16) - 128)
        assert np.abs(made.astype(np.int16)).max() == 127
        # The control: read as signed without turning the bit over, they are others.
        assert (made != stored.view(np.int8)).any()


@pytest.mark.skipif(not cpu_has_vnni(), reason="this CPU has no VNNI")
def test_both_graphs_give_the_same_bits(quantized: Path) -> None:
    """The control is the float32 graph, whose numbers are others."""
    results = {
        name: run(quantized / name, BATCHES, weights_in=quantized, dtype=np.float32)
        for name in (CPU_INT8_GRAPH, VNNI_GRAPH, "model.cpu.onnx")
    }
    for index in range(len(BATCHES)):
        np.testing.assert_array_equal(results[CPU_INT8_GRAPH][index], results[VNNI_GRAPH][index])
        assert (results["model.cpu.onnx"][index] != results[VNNI_GRAPH][index]).any()


@pytest.mark.parametrize(("has_vnni", "graph"), [(True, VNNI_GRAPH), (False, CPU_INT8_GRAPH)])
def test_the_processor_chooses(
    has_vnni: bool, graph: str, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, has_vnni)
    with VisionEncoder.open(quantized, backend="onnxruntime-cpu", flavour="cpu-int8") as encoder:
        assert encoder.info["graph"] == graph
        assert encoder.info["precision"] == "cpu-int8"


def test_a_directory_of_an_earlier_version(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the graph that every processor runs, and no other."""
    directory = copy_of(quantized, tmp_path / "m")
    Manifest.read(directory).withdraw(directory, [VNNI_GRAPH])
    pretend(monkeypatch, True)
    with VisionEncoder.open(directory, backend="onnxruntime-cpu", flavour="cpu-int8") as encoder:
        assert encoder.info["graph"] == CPU_INT8_GRAPH


def test_it_is_refused_without_vnni(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"backend": "onnxruntime-cpu", "flavour": "cpu-int8-vnni"}
    pretend(monkeypatch, False)
    with refused(BackendError, VNNI_GRAPH, "VNNI") as caught:
        VisionEncoder.open(quantized, **options)
    assert "cpu-int8" in str(caught.value.hint)
    pretend(monkeypatch, True)
    with VisionEncoder.open(quantized, **options) as encoder:  # the control
        assert encoder.info["graph"] == VNNI_GRAPH


@pytest.mark.parametrize("has_vnni", [True, False])
def test_parity_compares_it_where_it_is_exact(
    has_vnni: bool, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, has_vnni)
    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    manifest = Manifest.read(quantized)
    graphs = graphs_from_directory(quantized, manifest, [CPU_INT8_GRAPH, VNNI_GRAPH])
    assert graphs[VNNI_GRAPH].facts == graphs[CPU_INT8_GRAPH].facts
    found = candidates.candidates_from_graphs(graphs, quantized, manifest.config, progress=progress)
    names = [candidate.subject for candidate in found]
    assert names == [CPU_INT8_GRAPH, VNNI_GRAPH][: 1 + has_vnni]
    assert [VNNI_GRAPH in note for note in notes] == [True] * (not has_vnni)


def test_no_other_graph_may_read_its_weights(quantized: Path, tmp_path: Path) -> None:
    directory = copy_of(quantized, tmp_path / "m")
    manifest = Manifest.read(directory)
    assert f"{CPU_INT8_GRAPH}.data" in external_locations((directory / VNNI_GRAPH).read_bytes())
    manifest.verify(directory, [VNNI_GRAPH])
    (directory / "model.other.onnx").write_bytes((directory / VNNI_GRAPH).read_bytes())
    manifest.update(
        directory, files={"model.other.onnx": file_record(directory / "model.other.onnx")}
    )
    with refused(ManifestError, "model.other.onnx", f"{CPU_INT8_GRAPH}.data", reason="unsafe"):
        manifest.verify(directory, ["model.other.onnx"])


def test_a_verdict_is_about_its_weights(quantized: Path) -> None:
    """Both graphs: other weights of `cpu-int8` are another content. The control: the same weights are not."""
    files = Manifest.read(quantized).files
    data = f"{CPU_INT8_GRAPH}.data"
    other = {**files, data: dataclasses.replace(files[data], sha256="0" * 64)}
    for name in (CPU_INT8_GRAPH, VNNI_GRAPH):
        assert content_sha256(name, files) != content_sha256(name, other)
        assert content_sha256(name, files) == content_sha256(name, dict(files))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_vnni amx_int8\n", True),
        ("flags: fpu avx2 avx_vnni\n", True),
        ("flags: fpu avx2 avx512f\n", False),
        ("Features: fp asimd asimddp i8mm\n", False),
        (None, False),
    ],
    ids=["avx512", "avx", "without", "arm", "no such file"],
)
def test_flags(
    text: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "cpuinfo"
    if text is not None:
        facts.write_text(text)
    monkeypatch.setattr(processor, "PROCESSOR_FACTS", facts)
    assert cpu_has_vnni() == expected
    assert bool(processor_flags()) == (text is not None)
