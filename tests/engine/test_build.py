"""Building engines: the lowering, the request's rules, and real builds with TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from mmvision_export.artifacts.engine_record import EngineAttention, EngineRecord, GraphRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.artifacts.profile import Profile, profiles_from_buckets, profiles_from_slots
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import (
    BackendError,
    EngineError,
    ExportError,
    ManifestError,
    OutputError,
)
from mmvision_export.core.files import file_record
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import Lowering
from mmvision_export.engine.build import (
    build_engine,
)
from mmvision_export.engine.builder import Plan, PlanRequest
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.engine.polygraphy_setup import use_tensorrt
from mmvision_export.engine.target import choose_tensorrt
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.graph.passes import retype
from mmvision_export.models.weights import WeightSource
from mmvision_export.runtime.backends.cuda import current_compute_capability
from tests.support.configs import HEAD_DIM_48, HEAD_DIM_64, HEAD_DIM_80, copy_of
from tests.support.errors import refused
from tests.support.notes import Notes

AMPERE, ADA, BLACKWELL = map(ComputeCapability.parse, ("8.6", "8.9", "12.0"))
FUSED = EngineAttention(way="native", body="attention", fused=True)
PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


@pytest.fixture(scope="module")
def directory(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(exported, tmp_path_factory.mktemp("engine") / "m")


def build(directory: Path, **options: Any) -> tuple[Path, EngineRecord]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return build_engine(
        directory,
        Manifest.read(directory),
        **{"profiles": [PROFILE], "backend": "tensorrt-rtx", "force": True, **options},
    )


def test_fp16_engine_for_a_gpu_that_is_not_here(directory: Path) -> None:
    notes = Notes()
    engine, record = build(directory, precision="fp16", compute_capabilities=[ADA], progress=notes)
    assert engine.parent == directory / "plans"
    assert engine.name.endswith("-sm89-fp16.engine")
    assert engine.name.startswith("tensorrt-rtx-")
    assert engine.stat().st_size > 100_000
    assert EngineRecord.read(engine) == record
    assert record.engine == file_record(engine)
    assert record.compute_capabilities == (ADA,)
    assert record.attention == FUSED
    assert record.profiles == (PROFILE,)
    manifest = Manifest.read(directory)
    assert record.graph == GraphRecord(
        name="model.fp16.onnx",
        sha256=manifest.files["model.fp16.onnx"].sha256,
        data_sha256=manifest.files["model.fp16.onnx.data"].sha256,
        data_bytes=(directory / "model.fp16.onnx.data").stat().st_size,
    )
    assert record.graph.data_bytes is not None
    assert record.plan_per_weights == engine.stat().st_size / record.graph.data_bytes
    manifest.verify(directory, manifest.files)
    assert "comparing model.fp16.onnx with model.onnx" in notes.steps
    assert "building engine" in notes.steps
    assert any("has not been compared with PyTorch" in note for note in notes.notes)


def test_one_engine_with_a_profile_for_each_bucket(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them but the first may keep weights of its own."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    use_tensorrt("tensorrt-rtx")  # before Polygraphy looks for one by itself
    from polygraphy.backend.trt import Profile as TensorProfile

    made: list[Any] = []
    whole = TensorProfile.to_trt

    def to_trt(self: Any, builder: Any, network: Any) -> Any:
        made.append((builder, whole(self, builder, network)))
        assert made[-1][1].extra_memory_target == 1.0  # TensorRT's default
        return made[-1][1]

    monkeypatch.setattr(TensorProfile, "to_trt", to_trt)
    profiles = profiles_from_buckets([256, 64, 1024], [8], HEAD_DIM_80)
    _, record = build(directory, profiles=profiles, precision="fp16", compute_capabilities=[ADA])
    assert [p.max_patches for p in record.profiles] == [64, 256, 1024]
    assert all(p.is_bucket and p.max_images == 9 for p in record.profiles)
    assert record.attention == FUSED
    assert [profile.extra_memory_target for _, profile in made] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("buckets", "times", "is_noted"),
    [([64, 256], 1.25, True), ([64, 256], 1.15, False), ([64], 1.25, False)],
)
def test_an_engine_that_keeps_weights_twice_is_noted(
    directory: Path,
    buckets: list[int],
    times: float,
    is_noted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights_bytes = Manifest.read(directory).files["model.onnx.data"].size_bytes
    plan = Plan(bytes(round(times * weights_bytes)))
    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", lambda *_, **__: plan)
    notes = Notes()
    _, record = build(
        directory,
        profiles=profiles_from_buckets(buckets, [8], HEAD_DIM_80),
        compute_capabilities=[ADA],
        progress=notes,
    )
    assert record.plan_per_weights == pytest.approx(times, rel=1e-3)
    noted = [note for note in notes.notes if "--buckets" in note]
    assert bool(noted) == is_noted
    if is_noted:
        assert all(fact in noted[0] for fact in ("1.25", f"{weights_bytes / 1e6:.1f} MB", "1.2 "))


def test_one_engine_for_several_gpus(directory: Path) -> None:
    engine, record = build(directory, precision="fp16", compute_capabilities=[BLACKWELL, AMPERE])
    assert record.compute_capabilities == (AMPERE, BLACKWELL)
    assert "-sm86-120-" in engine.name


def test_without_a_gpu_the_default_is_every_gpu(directory: Path) -> None:
    if current_compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    notes = Notes()
    _, record = build(directory, precision="fp16", progress=notes)
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(map(str, record.compute_capabilities))
    assert any("building for all that TensorRT-RTX supports" in note for note in notes.notes)


@pytest.mark.parametrize(("way", "rows"), [("uniform", 2), ("equal", 1)])
def test_an_engine_of_slots(directory: Path, way: Any, rows: int) -> None:
    """Two buckets, one engine, and no permission to split attention into several kernels."""
    profiles = profiles_from_slots([(4, 64), (1, 64)], rows, HEAD_DIM_80)
    engine, record = build(
        directory, profiles=profiles, attention=way, precision="fp16", compute_capabilities=[ADA]
    )
    assert record.attention == EngineAttention(way=way, body="attention", fused=True)
    assert not record.attention.masked
    assert record.profiles == tuple(profiles)
    assert EngineRecord.read(engine) == record
    assert record.passed_over == {}


def test_auto_takes_slots_where_they_are_given(directory: Path) -> None:
    profiles = profiles_from_slots([(2, 64)], 2, HEAD_DIM_80)
    _, record = build(directory, profiles=profiles, compute_capabilities=[ADA])
    assert record.attention == EngineAttention(way="uniform", body="attention")


@pytest.mark.parametrize(
    ("attention", "profiles"),
    [
        ("uniform", [PROFILE]),
        ("uniform", profiles_from_buckets([64, 256], [8], HEAD_DIM_80)),
        ("uniform", profiles_from_slots([(2, 64)], 1, HEAD_DIM_80)),
        ("equal", profiles_from_slots([(2, 64)], 2, HEAD_DIM_80)),
        ("native", profiles_from_slots([(2, 64)], 2, HEAD_DIM_80)),
        ("plugin", profiles_from_slots([(2, 64)], 2, HEAD_DIM_80)),
        # Which of its images fill their slots, `auto` does not know.
        ("auto", profiles_from_slots([(2, 64)], 1, HEAD_DIM_80)),
    ],
)
def test_sizes_of_another_way(directory: Path, attention: Any, profiles: list[Profile]) -> None:
    before = sorted(directory.rglob("*"))
    with refused(EngineError, attention) as caught:
        build(directory, profiles=profiles, attention=attention, compute_capabilities=[ADA])
    assert "--buckets" in str(caught.value.hint)
    assert sorted(directory.rglob("*")) == before


def test_fp32_attention_is_left_to_the_builder(directory: Path) -> None:
    _, record = build(directory, compute_capabilities=[ADA])
    assert (record.precision, str(record.attention)) == (
        "fp32",
        "attention body, left to the builder",
    )


@pytest.mark.parametrize("config", [HEAD_DIM_64, HEAD_DIM_48], ids=["64", "48"])
def test_other_head_dims(config: Any, tmp_path: Path) -> None:
    """48 is where no channel passes the rotation by, and a slice is empty."""
    export_model_directory(
        WeightSource(random_config=config, seed=1), tmp_path / "m", precision="fp16"
    )
    _, record = build(tmp_path / "m", compute_capabilities=[AMPERE, BLACKWELL])
    assert record.attention == FUSED


def test_bf16_engine(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="bf16"
    )
    _, record = build(tmp_path / "m", compute_capabilities=[AMPERE, BLACKWELL])
    assert record.precision == "bf16"
    with pytest.raises(EngineError, match=r"does not build bf16 engines for 7\.5"):
        build(tmp_path / "m", compute_capabilities=[ComputeCapability(7, 5)])
    with pytest.raises(
        EngineError, match="is a bf16 model, from which no fp16 engine can be built"
    ):
        build(tmp_path / "m", precision="fp16")


def test_low_opset_engine(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", opset=18
    )
    _, record = build(tmp_path / "m", precision="fp16", compute_capabilities=[ADA])
    assert record.attention == EngineAttention(way="native", body="matmul")


def test_derived_graph_is_made_once(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    name = derive_fp16(directory, Manifest.read(directory))
    stamp = (directory / name).stat().st_mtime_ns
    assert derive_fp16(directory, Manifest.read(directory)) == name
    assert (directory / name).stat().st_mtime_ns == stamp


def test_a_wrong_derived_graph_is_not_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Derived with one layer's weights doubled: refused, and nothing of it stays for the next build to find."""
    directory = copy_of(exported, tmp_path / "m")

    def wrong(model: ir.Model, dtype: ir.DataType) -> None:
        retype(model, dtype)
        value = model.graph.initializers["layers.1.mlp.fc2.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2)

    monkeypatch.setattr("mmvision_export.engine.float16.retype", wrong)
    with refused(ExportError, "model.fp16.onnx", "model.onnx", "two sizes"):
        derive_fp16(directory, Manifest.read(directory))
    assert sorted(p.name for p in directory.iterdir()) == sorted(p.name for p in exported.iterdir())
    assert "model.fp16.onnx" not in Manifest.read(directory).files


def test_checking_without_onnxruntime_says_what_to_do(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused(BackendError, "model.fp16.onnx", "ONNX Runtime") as caught:
        derive_fp16(directory, Manifest.read(directory))
    assert "--no-check" in str(caught.value.hint)
    derive_fp16(directory, Manifest.read(directory), check=False)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"compute_capabilities": [ComputeCapability(9, 0)]}, ["fp32", "9.0"]),
        ({"precision": "bf16"}, ["fp32", "bf16"]),
    ],
)
def test_requests_that_cannot_be_met(
    directory: Path, options: dict[str, Any], facts: list[str]
) -> None:
    before = sorted(directory.rglob("*"))
    with refused(EngineError, *facts):
        build(directory, **options)
    assert sorted(directory.rglob("*")) == before


def test_classic_tensorrt_is_not_installed_here(directory: Path) -> None:
    try:
        choose_tensorrt("tensorrt")
    except BackendError as error:
        assert "tensorrt" in str(error)
        assert error.hint is not None
        with pytest.raises(BackendError):
            build(directory, backend="tensorrt")
    else:
        pytest.skip("TensorRT is installed")


def test_an_existing_engine_is_kept(directory: Path) -> None:
    build(directory, compute_capabilities=[ADA])
    with pytest.raises(OutputError, match="already exists"):
        build(directory, compute_capabilities=[ADA], force=False)


def test_damaged_weights_are_not_built_from(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    data = directory / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    for precision in ("fp32", "fp16"):
        with pytest.raises(ManifestError, match="sha256"):
            build(directory, compute_capabilities=[ADA], precision=precision)
    assert not list(directory.glob("plans"))
    assert not list(directory.glob("model.fp16*"))


def test_a_graph_that_failed_its_comparison_is_not_built(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    Manifest.read(directory).update(directory, parity={"model.onnx": {"passed": False}})
    for precision in ("fp32", "fp16"):  # neither from it nor from what is derived from it
        with pytest.raises(
            EngineError, match=r"model\.onnx did not pass its comparison with PyTorch"
        ):
            build(directory, compute_capabilities=[ADA], precision=precision)
    build(directory, compute_capabilities=[ADA], check=False)


def test_a_rebuilt_engine_loses_what_was_measured_on_the_old_one(
    exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    engine, _ = build(directory, compute_capabilities=[ADA])
    Manifest.read(directory).update(directory, parity={f"plans/{engine.name}": {"passed": True}})
    build(directory, compute_capabilities=[ADA])
    assert Manifest.read(directory).parity == {}


def test_a_parser_error_is_shown_in_full(exported: Path, tmp_path: Path) -> None:
    """A graph with an operator that no TensorRT has: the error names node and operator."""
    directory = copy_of(exported, tmp_path / "m")
    model = ir.load(directory / "model.onnx")
    node = next(node for node in model.graph if node.op_type == "Gelu")
    node.op_type, node.domain = "Hypergelu", "acme"
    model.opset_imports["acme"] = 1
    ir.save(model, directory / "model.onnx")
    manifest = Manifest.read(directory)
    manifest.files["model.onnx"] = file_record(directory / "model.onnx")
    manifest.write(directory)
    with pytest.raises(EngineError) as caught:
        build(directory, compute_capabilities=[ADA])
    message = str(caught.value)
    assert "cannot parse model.onnx" in message
    assert "layers.0.mlp.activation (Hypergelu)" in message
    assert not list(directory.glob("plans/*.engine"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_nothing(
    exported: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    directory = copy_of(exported, tmp_path / "m")
    command = [
        sys.executable,
        "-m",
        "mmvision_export.cli.entry",
        "build-engine",
        "--model",
        str(directory),
    ]
    command += ["--compute-capability", "8.9"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "building engine" in line:
                break
        process.send_signal(signum)
        error = process.stderr.read()
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not list(directory.rglob("*.engine"))
    assert not list(directory.rglob("*.partial"))


def test_sidecar_is_json(directory: Path) -> None:
    engine, _ = build(directory, compute_capabilities=[ADA])
    content = json.loads(engine.with_suffix(".json").read_text())
    assert content["profiles"][0]["max_patches"] == 256
    assert content["config"]["hidden_size"] == 160


def test_an_engine_with_plugins_brings_its_library(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written, on a TensorRT that builds a plan at once: no TensorRT that takes plugins runs here."""
    library = tmp_path / "libmmvision_plugins.so"
    library.write_bytes(b"a library")
    record = PluginLibraryRecord(
        library=file_record(library),
        machine="x86_64",
        sms=[80],
        head_dims=[80],
        dtypes=["fp16"],
        versions={},
    )
    loaded: list[str] = []
    nodes: list[str] = []

    def plan(request: PlanRequest, **_: Any) -> Plan:
        nodes.extend(node.op_type for node in onnx.load_model_from_string(request.model).graph.node)
        return Plan(b"plan")

    monkeypatch.setattr(
        "mmvision_export.engine.build.choose_lowering",
        lambda *_, **__: Lowering(None, (library, record)),
    )
    monkeypatch.setattr(
        "mmvision_export.engine.build.load_plugin_library",
        lambda _, __, sha256: loaded.append(sha256),
    )
    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    engine, written = build(directory, compute_capabilities=[ADA])
    assert loaded == [record.library.sha256]
    assert nodes.count("VarlenAttention") == HEAD_DIM_80.num_hidden_layers
    assert (written.attention, written.attention.masked) == (EngineAttention(way="plugin"), False)

    read = EngineRecord.read(engine)
    assert read == written
    assert read.plugin_library is not None
    copy = read.plugin_library.verify(engine)
    assert copy.read_bytes() == b"a library"
    assert copy.name == f"libmmvision_plugins-{record.library.sha256[:12]}.so"
    copy.write_bytes(b"b library")
    with refused(ManifestError, copy, "sha256", "sidecar"):
        read.plugin_library.verify(engine)
    copy.unlink()
    with refused(ManifestError, copy.name):
        read.plugin_library.verify(engine)


def test_packed_attention_is_refused_where_no_builder_has_a_kernel(directory: Path) -> None:
    """TensorRT-RTX 1.7 parses the graph and has none; a later one may, so that one would be asked."""
    notes = Notes()
    with refused(EngineError, "packed", "TensorRT-RTX", "kernel"):
        build(
            directory,
            precision="fp16",
            compute_capabilities=[ADA],
            attention="packed",
            progress=notes,
        )
    assert "building engine" not in notes.steps


def test_packed_attention_is_refused_by_a_builder_without_a_kernel(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table says of TensorRT-RTX, asked of its builder."""
    monkeypatch.setattr("mmvision_export.engine.attention._LAST_RTX_WITHOUT", (1, 0))
    with pytest.raises(EngineError, match="attention|Attention|ATTENTION"):
        build(directory, precision="fp16", compute_capabilities=[ADA], attention="packed")
    assert not list((directory / "plans").glob("*.partial"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_auto_takes_slots_where_there_are_any(directory: Path, precision: str) -> None:
    """TensorRT-RTX has neither plugins nor packed attention, and another way keeps its own sizes."""
    slots = profiles_from_slots([(1, 64), (2, 16)], 2, HEAD_DIM_80)
    sizes = {"precision": precision, "compute_capabilities": [ADA], "slots": slots}
    _, record = build(directory, **sizes)
    assert record.attention.way == "uniform"
    assert [str(profile) for profile in record.profiles] == [str(profile) for profile in slots]
    _, record = build(directory, **sizes, attention="native", force=True)
    assert record.attention.way == "native"
    assert [profile.slots for profile in record.profiles] == [None]


def test_packed_attention_that_was_not_asked_for_falls_back_to_native(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto` chooses on TensorRT 11.1, here with a builder that has no packed kernel."""
    monkeypatch.setattr(
        "mmvision_export.engine.build.choose_lowering",
        lambda *_, **__: Lowering("packed", fallback=Lowering("attention")),
    )
    notes = Notes()
    _, record = build(directory, precision="fp16", compute_capabilities=[ADA], progress=notes)
    assert record.attention == EngineAttention(way="native", body="attention", fused=True)
    first = next(iter(record.passed_over))
    assert first == "packed attention"
    assert any(record.passed_over[first] in note for note in notes.notes)


def test_packed_attention_may_not_be_built_from_several_kernels(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    permissions: list[bool] = []

    def plan(request: PlanRequest, *, decomposable: bool, progress: Progress) -> Plan:
        permissions.append(decomposable)
        return Plan(b"plan")

    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    monkeypatch.setattr("mmvision_export.engine.attention._LAST_RTX_WITHOUT", (1, 0))
    _, record = build(directory, precision="fp16", compute_capabilities=[ADA], attention="packed")
    assert permissions == [False]
    assert record.attention == EngineAttention(way="packed")
