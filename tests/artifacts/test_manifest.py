"""Model directories and sidecars: found, verified, refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.artifacts.build_target import Installation, TensorRTVersion
from mmvision_export.artifacts.engine_record import (
    EngineAttention,
    EngineRecord,
    GraphRecord,
    refuse_foreign_engine,
    sidecar_path,
)
from mmvision_export.artifacts.manifest import (
    DATA,
    GRAPH,
    MANIFEST,
    Manifest,
    find_model_directory,
    model_directory_of,
)
from mmvision_export.artifacts.profile import Profile, profiles_from_buckets, profiles_from_slots
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord, file_record
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from tests.support.configs import copy_of
from tests.support.engines import ENGINE, write_engine
from tests.support.errors import refused
from tests.support.records import content_of

HERE = Installation(
    backend="tensorrt-rtx",
    tensorrt_version=TensorRTVersion("1.7.1.116"),
    platform="linux-x86_64",
)
ADA = ComputeCapability(8, 9)
PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


SLOTS = {
    way: tuple(profiles_from_slots([(2, 64)], rows, EncoderConfig()))
    for way, rows in (("uniform", 2), ("equal", 1))
}


def refuse_foreign(engine: Path, **changes: Any) -> None:
    """Refuse an engine as the machine `HERE`, with a GPU of 8.9 and no manifest, would."""
    record = EngineRecord.read(engine)
    machine: dict[str, Any] = {"here": HERE, "compute_capability": ADA, "manifest": None}
    refuse_foreign_engine(engine, record, **{**machine, **changes})


def test_sidecar_round_trips(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    assert sidecar_path(engine).name == ENGINE.replace(".engine", ".json")
    record = EngineRecord.read(engine)
    assert record.profiles == (PROFILE,)
    refuse_foreign(engine)
    record.write(sidecar_path(engine))
    assert EngineRecord.read(engine) == record


def test_sidecars_of_one_profile_are_still_read(tmp_path: Path) -> None:
    """Format 1 had one profile, without a least number of images."""
    engine = write_engine(tmp_path)
    content = content_of(sidecar_path(engine))
    (profile,) = content.pop("profiles")
    del profile["min_images"]
    sidecar_path(engine).write_text(json.dumps({**content, "format": 1, "profile": profile}))
    assert EngineRecord.read(engine).profiles == (PROFILE,)
    for form in (0, 3, "1", None, True):
        sidecar_path(engine).write_text(json.dumps({**content, "format": form, "profile": profile}))
        with pytest.raises(ManifestError) as caught:
            EngineRecord.read(engine)
        assert repr(form) in str(caught.value)
        assert str(sidecar_path(engine)) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "attention"),
    [
        ("plugin", EngineAttention(way="plugin")),
        ("packed, TensorRT's own", EngineAttention(way="packed")),
        ("attention body, fused", EngineAttention(way="native", body="attention", fused=True)),
        ("matmul body, left to the builder", EngineAttention(way="native", body="matmul")),
        (
            "uniform, attention body, fused",
            EngineAttention(way="uniform", body="attention", fused=True),
        ),
        ("equal, matmul body, left to the builder", EngineAttention(way="equal", body="matmul")),
    ],
)
def test_attention_of_sidecars_that_only_describe_it(
    words: str, attention: EngineAttention, tmp_path: Path
) -> None:
    profiles = SLOTS[attention.way] if attention.rows_per_slot else (PROFILE,)
    engine = write_engine(tmp_path, attention=attention, profiles=profiles)
    content = content_of(sidecar_path(engine))
    assert content["attention"] == words
    assert EngineRecord.read(engine).attention == attention
    # What is read is the fields, where there are any; of an early sidecar, the words.
    for changes in ({"attention": "in other words"}, {"lowering": None}):
        sidecar_path(engine).write_text(json.dumps({**content, **changes}))
        assert EngineRecord.read(engine).attention == attention
    del content["lowering"]
    sidecar_path(engine).write_text(json.dumps(content))
    read = EngineRecord.read(engine)
    assert read.attention == attention
    assert read.attention.masked == (attention.way == "native")


def test_profiles_of_slots_round_trip_and_others_are_refused(tmp_path: Path) -> None:
    uniform = EngineAttention(way="uniform", body="matmul")
    engine = write_engine(tmp_path, attention=uniform, profiles=SLOTS["uniform"])
    read = EngineRecord.read(engine)
    assert read.profiles == SLOTS["uniform"]
    assert (read.profiles[0].slots, read.profiles[0].rows_per_slot) == (2, 2)
    odd_rows = tuple(profiles_from_buckets([64], [2], EncoderConfig()))
    for profiles in ((PROFILE,), odd_rows):
        with refused(ManifestError, "profiles[0]", "uniform"):
            dataclasses.replace(read, profiles=profiles)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            {"compute_capability": ComputeCapability(12, 0)},
            ("compute capability", "8.6, 8.9", "12.0"),
        ),
        (
            {"here": dataclasses.replace(HERE, tensorrt_version=TensorRTVersion("1.8.0"))},
            ("TensorRT version", "1.7.1.116", "1.8.0"),
        ),
        (
            {"here": dataclasses.replace(HERE, backend="tensorrt")},
            ("TensorRT kind", "tensorrt-rtx", "has tensorrt"),
        ),
        (
            {"here": dataclasses.replace(HERE, platform="linux-aarch64")},
            ("platform", "linux-x86_64", "linux-aarch64"),
        ),
    ],
)
def test_foreign_engines_are_refused_with_both_values(
    changes: dict[str, Any], facts: tuple[str, ...], tmp_path: Path
) -> None:
    engine = write_engine(tmp_path)
    with pytest.raises(ManifestError) as caught:
        refuse_foreign(engine, **changes)
    assert all(fact in str(caught.value) for fact in (str(engine), *facts))
    assert "mmvision build-engine" in str(caught.value.hint)


def test_engine_of_another_graph(exported: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(exported)
    engine = write_engine(tmp_path)
    with pytest.raises(ManifestError) as caught:
        refuse_foreign(engine, manifest=manifest)
    assert "0" * 64 in str(caught.value)
    assert manifest.files["model.onnx"].sha256 in str(caught.value)


def test_engine_of_other_weights(exported: Path, tmp_path: Path) -> None:
    """The graphs of two checkpoints are the same file; an engine has one's weights inside."""
    manifest = Manifest.read(exported)
    graph = GraphRecord(
        name="model.onnx", sha256=manifest.files["model.onnx"].sha256, data_sha256="1" * 64
    )
    engine = write_engine(tmp_path, graph=graph)
    with pytest.raises(ManifestError) as caught:
        refuse_foreign(engine, manifest=manifest)
    assert "model.onnx.data" in str(caught.value)
    assert "1" * 64 in str(caught.value)
    data = manifest.files["model.onnx.data"].sha256
    refuse_foreign(
        write_engine(tmp_path, graph=dataclasses.replace(graph, data_sha256=data)),
        manifest=manifest,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compute_capabilities", "8.9"),
        ("compute_capabilities", [8.9]),
        ("compute_capabilities", ["ada"]),
        ("profiles", []),
        (
            "profiles",
            [{"min_patches": "4", "opt_patches": 4, "max_patches": 4, "max_images": 1}],
        ),
        ("profiles", [{"min_patches": 8, "opt_patches": 4, "max_patches": 4, "max_images": 1}]),
        ("profile", {"min_patches": 4, "opt_patches": 4, "max_patches": 4, "max_images": 1}),
        ("graph", {"name": "model.onnx"}),
        ("config", {}),
        ("precision", "int4"),
        ("backend", "tensorflow"),
        ("tensorrt_version", "latest"),
        ("lowering", {"way": "other"}),
        ("plugin_library", "libmmvision_plugins.so"),
    ],
)
def test_sidecars_with_wrong_types(field: str, value: Any, tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    content = content_of(sidecar_path(engine))
    sidecar_path(engine).write_text(json.dumps({**content, field: value}))
    with pytest.raises(ManifestError) as caught:
        EngineRecord.read(engine)
    assert str(sidecar_path(engine)) in str(caught.value)
    sidecar_path(engine).write_text(json.dumps(content))
    EngineRecord.read(engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", {}),
        ("source", "checkpoint"),
        ("source", {"kind": "random"}),
        ("parity", []),
        ("opset", "x"),
        ("precision", "int4"),
        ("config", {}),
    ],
)
def test_manifests_with_wrong_types(field: str, value: Any, exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    content = content_of(directory / "manifest.json")
    (directory / "manifest.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ManifestError) as caught:
        Manifest.read(directory)
    assert str(directory / "manifest.json") in str(caught.value)
    assert field == "config" or field in str(caught.value)


def test_manifests_that_name_the_attention_ops_are_still_read(
    exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    content = content_of(directory / "manifest.json")
    assert "attention_body" not in content
    (directory / "manifest.json").write_text(json.dumps({**content, "attention_body": "matmul"}))
    assert Manifest.read(directory) == Manifest.read(exported)
    (directory / "manifest.json").write_text(json.dumps({**content, "attention_bodies": "matmul"}))
    with refused(ManifestError, "attention_bodies", reason="malformed"):
        Manifest.read(directory)


def test_json_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with refused(ManifestError, tmp_path / "manifest.json", reason="unreadable"):
        Manifest.read(tmp_path)


def test_the_model_directory_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_engine(tmp_path / "m" / "plans")
    assert model_directory_of(engine) is None
    (tmp_path / "m" / "manifest.json").write_text("{}")
    assert model_directory_of(engine) == tmp_path / "m"
    monkeypatch.chdir(engine.parent)
    assert model_directory_of(Path(engine.name)) == tmp_path / "m"
    alone = write_engine(tmp_path / "m" / "elsewhere")
    assert model_directory_of(alone) is None


def test_changed_engine_files(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    engine.write_bytes(b"executable Content")
    record = EngineRecord.read(engine)

    def mapped(path: Path) -> None:
        with record.verified_map(path) as content:
            assert content[:] == b"executable content"

    for check in (record.verify, mapped):
        engine.write_bytes(b"executable Content")
        with refused(ManifestError, engine, record.engine.sha256):
            check(engine)
        engine.write_bytes(b"executable")
        with refused(ManifestError, engine, 10, 18):
            check(engine)
        engine.write_bytes(b"executable content")
        check(engine)


def test_an_engine_is_mapped_and_not_copied(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1 << 24)
    engine = tmp_path / "large.engine"
    engine.write_bytes(content)
    record = FileRecord.of(content)

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def mapped() -> None:
        with record.verified_map(engine, said_by="the test") as plan, memoryview(plan) as view:
            assert view.readonly
            assert hashlib.sha256(view).hexdigest() == record.sha256

    assert peak(mapped) < 1 << 20
    assert peak(engine.read_bytes) > 1 << 23  # what a copy would show


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "profile": {}, "engine": {}}']
)
def test_malformed_sidecars(content: str, tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    sidecar_path(engine).write_text(content)
    with pytest.raises(ManifestError):
        EngineRecord.read(engine)
    sidecar_path(engine).unlink()
    with refused(ManifestError, sidecar_path(engine)):
        EngineRecord.read(engine)
    with refused(ManifestError, tmp_path / "other.engine"):
        EngineRecord.read(tmp_path / "other.engine")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"format": 99}', '{"format": 1, "config": {"depth": 3}, "files": {}}'],
)
def test_malformed_manifests(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError):
        Manifest.read(tmp_path)


def test_no_model_directory(tmp_path: Path) -> None:
    with refused(ManifestError, tmp_path / "nothing", reason="missing"):
        Manifest.read(tmp_path / "nothing")
    with refused(ManifestError, tmp_path / "manifest.json", reason="missing"):
        Manifest.read(tmp_path)


def test_verify_names_what_differs(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    manifest = Manifest.read(directory)
    manifest.verify(directory, manifest.files)
    data = directory / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with refused(ManifestError, data, "sha256", manifest.files[data.name].sha256):
        manifest.verify(directory, ["model.onnx.data"])
    data.write_bytes(content[:-1])
    with refused(ManifestError, data, len(content) - 1, len(content)):
        manifest.verify(directory, ["model.onnx.data"])
    data.unlink()
    with refused(ManifestError, data, reason="missing"):
        manifest.verify(directory, ["model.onnx.data"])
    with refused(ManifestError, "model.other.onnx"):
        manifest.verify(directory, ["model.other.onnx"])


def test_the_only_model_directory_is_found(tmp_path: Path) -> None:
    with refused(ManifestError, f"{tmp_path}/"):
        find_model_directory(None, tmp_path)
    for name in (".a.partial", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        if name == "a":
            (tmp_path / "not a model").mkdir()
            assert find_model_directory(None, tmp_path) == tmp_path / "a"
    with refused(ManifestError, 2, tmp_path / "a", tmp_path / "b") as caught:
        find_model_directory(None, tmp_path)
    assert "--model" in str(caught.value.hint)
    assert find_model_directory(tmp_path / "b", tmp_path) == tmp_path / "b"


def test_manifest_file_is_plain_json(exported: Path) -> None:
    content = content_of(exported / "manifest.json")
    assert content["format"] == 1
    assert content["files"]["model.onnx"] == dataclasses.asdict(
        file_record(exported / "model.onnx")
    )
    assert isinstance(Manifest.read(exported).files["model.onnx"], FileRecord)


def test_sidecars_from_before_a_field_was_kept(tmp_path: Path) -> None:
    """They open, and do not know it."""
    engine = write_engine(tmp_path)
    content = content_of(sidecar_path(engine))
    del content["passed_over"], content["gpu"]
    del content["graph"]["data_bytes"]
    sidecar_path(engine).write_text(json.dumps(content))
    record = EngineRecord.read(engine)
    assert record.passed_over == {}
    assert record.gpu is None
    assert record.plan_per_weights is None


def test_two_processes_update_one_manifest(exported: Path, tmp_path: Path) -> None:
    """Each reads it once, and adds to it many times: nothing of either is lost."""
    directory = copy_of(exported, tmp_path / "m")
    program = """
import sys
from pathlib import Path
from mmvision_export.artifacts.manifest import Manifest
directory, who = Path(sys.argv[1]), sys.argv[2]
manifest = Manifest.read(directory)
for index in range(40):
    manifest.update(directory, parity={f"{who}.{index}": {"passed": True}})
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(directory), who]) for who in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    expected = {f"{who}.{index}" for who in "ab" for index in range(40)}
    assert expected <= set(Manifest.read(directory).parity)


@pytest.mark.parametrize("replaced", [GRAPH, DATA])
def test_a_result_for_files_that_were_replaced_is_refused(
    replaced: str, exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    mine, theirs = Manifest.read(directory), Manifest.read(directory)
    theirs.files[replaced] = FileRecord("0" * 64, 1)
    theirs.write(directory)
    with refused(ManifestError, replaced):
        mine.update(directory, parity={GRAPH: {"passed": True}})
    assert GRAPH not in Manifest.read(directory).parity
    # The control: the next command reads the new manifest.
    Manifest.read(directory).update(directory, parity={GRAPH: {"passed": True}})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "plans/x", "..", "", "a\\b", "a\0b"])
def test_files_outside_the_directory_are_refused(name: str, exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    content = content_of(directory / MANIFEST)
    content["files"][name] = content["files"][GRAPH]
    (directory / MANIFEST).write_text(json.dumps(content))
    with refused(ManifestError, repr(name), reason="malformed"):
        Manifest.read(directory)


def test_a_link_is_no_file_of_the_directory(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    elsewhere = tmp_path / "weights"
    (directory / DATA).rename(elsewhere)
    (directory / DATA).symlink_to(elsewhere)
    with refused(ManifestError, directory / DATA, reason="unsafe"):
        Manifest.read(directory).verify(directory, [DATA])
    (directory / DATA).unlink()
    elsewhere.rename(directory / DATA)
    Manifest.read(directory).verify(directory, [DATA])
