"""Engines that get their weights when they are opened, or stream them, on a stand-in for TensorRT.

No engine has been refitted on a GPU by these tests. The stand-in enforces that an engine without weights has no
context, that a budget comes before any context, and that code in an engine has to be allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import TensorRTVersion
from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.artifacts.engine_record import EngineRecord, GraphRecord, sidecar_path
from mmvision_export.artifacts.manifest import DATA, GRAPH, PLANS, Manifest
from mmvision_export.artifacts.profile import profiles_from_buckets
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.files import FileRecord, file_record
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused
from tests.support.fake_driver import (
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.fake_machine import KINDS, Machine
from tests.support.notes import Notes

STRIPPED = BuildOptions(strip_weights=True)
ANY = BuildOptions(strip_weights=True, refit=True)
BUCKETS = profiles_from_buckets([64, 256], [8], HEAD_DIM_80)


class Directory:
    """A model directory with one engine that takes weights, on a machine with a stand-in."""

    def __init__(self, machine: Machine, exported: Path, folder: Path) -> None:
        self.machine = machine
        self.path = copy_of(exported, folder / "m")
        self.engine = self.path / PLANS / machine.engine.name
        self.engine.parent.mkdir()
        shutil.copyfile(machine.engine, self.engine)
        shutil.copyfile(sidecar_path(machine.engine), sidecar_path(self.engine))

    def engine_of(self, options: BuildOptions, *, location: str = DATA, **changes: Any) -> None:
        """Make the engine one of these options, built from the directory as it is now."""
        files = Manifest.read(self.path).files
        graph = onnx.helper.make_graph([], "g", [], [], initializer=[_external(location)])
        model = onnx.helper.make_model(graph).SerializeToString()
        companion = None
        if options.takes_weights:
            companion = CompanionFile(f"{self.engine.stem}.refit.onnx", FileRecord.of(model))
            (self.engine.parent / companion.name).write_bytes(model)
        record = dataclasses.replace(
            EngineRecord.read(self.engine),
            graph=GraphRecord(
                name=GRAPH, sha256=files[GRAPH].sha256, data_sha256=files[DATA].sha256
            ),
            options=options,
            refit_graph=companion,
            **changes,
        )
        record.write(sidecar_path(self.engine))
        self.machine.trt.is_stripped = options.strip_weights
        self.machine.trt.has_host_code = options.version_compatible

    def other_weights(self) -> bytes:
        """Another checkpoint of the same graph in its place, as its manifest says."""
        content = (self.path / DATA).read_bytes()[::-1]
        (self.path / DATA).write_bytes(content)
        manifest = Manifest.read(self.path)
        manifest.files[DATA] = file_record(self.path / DATA)
        manifest.write(self.path)
        return content

    @contextlib.contextmanager
    def opened(self, **options: Any) -> Iterator[TensorRTBackend]:
        backend = KINDS[self.machine.kind](
            self.engine,
            BackendOptions(**options),
            module=self.machine.trt,
            cuda=self.machine.driver.cuda(),
            manifest=Manifest.read(self.path),
        )
        try:
            yield backend
        finally:
            backend.close()
        assert self.machine.holds_nothing()

    def open(self, **options: Any) -> TensorRTBackend:
        with self.opened(**options) as backend:
            return backend


def _external(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.fixture(params=KINDS)
def directory(
    request: pytest.FixtureRequest,
    fake_driver: FakeDriver,  # noqa: F811
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Directory:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    machine = Machine(fake_driver, tmp_path / "built", BUCKETS, request.param)
    return Directory(machine, exported, tmp_path)


def test_a_stripped_engine_gets_the_weights_of_its_directory(directory: Directory) -> None:
    directory.engine_of(STRIPPED)
    notes = Notes()
    with directory.opened(progress=notes) as backend:
        assert backend.info.refitted
        assert backend.info.weights_sha256 == file_record(directory.path / DATA).sha256
    assert directory.machine.trt.weights_read == [(directory.path / DATA).read_bytes()]
    assert "putting the weights into the engine" in notes.steps


def test_control_an_engine_with_weights_gets_none(directory: Directory) -> None:
    for options in (BuildOptions(), BuildOptions(refit=True)):
        directory.engine_of(options)
        assert directory.open().info.refitted is None
    assert directory.machine.trt.weights_read == []


def test_control_the_stand_in_runs_no_engine_without_weights(directory: Directory) -> None:
    directory.engine_of(BuildOptions())
    directory.machine.trt.is_stripped = True
    with pytest.raises(AssertionError, match="without its weights"):
        directory.open()


def test_one_plan_for_two_checkpoints(directory: Directory) -> None:
    """The embeddings are then called by the hash of the weights that made them."""
    for options in (ANY, BuildOptions(refit=True)):
        directory.engine_of(options)
        before = directory.open().info.weights_sha256
        other = directory.other_weights()
        info = directory.open().info
        assert info.refitted
        assert info.weights_sha256 == FileRecord.of(other).sha256 != before
        assert directory.machine.trt.weights_read[-1] == other


def test_other_weights_for_an_engine_that_does_not_take_them(directory: Directory) -> None:
    for options in (BuildOptions(), STRIPPED):
        directory.engine_of(options)
        directory.other_weights()
        with refused(ManifestError, directory.engine, f"{GRAPH}.data"):
            directory.open()
    assert directory.machine.trt.deserialised == []


def test_another_graph_is_refused_by_every_engine(directory: Directory) -> None:
    directory.engine_of(ANY)
    record = EngineRecord.read(directory.engine)
    graph = dataclasses.replace(record.graph, sha256="0" * 64)
    dataclasses.replace(record, graph=graph).write(sidecar_path(directory.engine))
    with refused(ManifestError, directory.engine, GRAPH):
        directory.open()


def test_weights_are_verified_before_they_are_put_in(directory: Directory) -> None:
    directory.engine_of(STRIPPED)
    data = directory.path / DATA
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with refused(ManifestError, data, "sha256"):
        directory.open(verify="always")
    assert directory.machine.trt.weights_read == []


def test_the_graph_is_verified_too(directory: Directory) -> None:
    directory.engine_of(STRIPPED)
    graph = directory.engine.parent / f"{directory.engine.stem}.refit.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    with refused(ManifestError, graph):
        directory.open()
    graph.unlink()
    with refused(ManifestError, graph, reason="missing"):
        directory.open()


@pytest.mark.parametrize("location", ["/etc/passwd", "../other.data", "manifest.json"])
def test_no_other_file_is_read_as_weights(directory: Directory, location: str) -> None:
    directory.engine_of(STRIPPED, location=location)
    with refused(ManifestError, location, reason="unsafe"):
        directory.open()
    assert directory.machine.trt.weights_read == []


def test_a_stripped_engine_that_lies_alone(directory: Directory) -> None:
    directory.engine_of(STRIPPED)
    with refused(ManifestError, directory.engine, "weights") as caught:
        KINDS[directory.machine.kind](
            directory.engine,
            BackendOptions(),
            module=directory.machine.trt,
            cuda=directory.machine.driver.cuda(),
            manifest=None,
        )
    assert "plans/" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        ("Refitter", ["reason of Refitter"]),
        ("refit_from_bytes", ["a parser's error", "reason of refit_from_bytes"]),
        ("get_missing_weights", ["layers.0.mlp.fc1.weight"]),
        ("refit_cuda_engine", ["reason of refit_cuda_engine"]),
    ],
)
def test_what_tensorrt_refuses(directory: Directory, call: str, facts: list[str]) -> None:
    directory.engine_of(STRIPPED)
    directory.machine.trt.fail = call
    with refused(BackendError, directory.engine, *facts):
        directory.open()
    assert directory.machine.holds_nothing()


def test_code_in_an_engine_is_allowed_where_it_is_expected(directory: Directory) -> None:
    directory.engine_of(
        BuildOptions(version_compatible=True), tensorrt_version=TensorRTVersion("1.2.0.54")
    )
    directory.open()
    directory.engine_of(BuildOptions(), tensorrt_version=TensorRTVersion("1.7.1.116"))
    directory.machine.trt.has_host_code = True
    with pytest.raises(BackendError, match="host code"):
        directory.open()
    directory.engine_of(
        BuildOptions(version_compatible=True), tensorrt_version=TensorRTVersion("1.8.0.1")
    )
    with refused(ManifestError, "1.8.0.1", "1.7.1.116"):
        directory.open()


def test_an_engine_for_ampere_and_later(directory: Directory) -> None:
    other: dict[str, Any] = {"compute_capabilities": (ComputeCapability(8, 0),)}
    directory.engine_of(BuildOptions(hardware="ampere-plus"), **other)
    assert directory.open().info.compute_capability == "8.9"
    directory.engine_of(BuildOptions(), **other)
    with refused(ManifestError, "8.0", "8.9"):
        directory.open()


@pytest.mark.parametrize(
    ("budget", "resident"), [(None, None), (0, 0), (300, 300), ("auto", 250), (5000, 1000)]
)
def test_a_budget_for_weights(directory: Directory, budget: Any, resident: int | None) -> None:
    directory.engine_of(BuildOptions(weight_streaming=True))
    directory.machine.trt.streamable_bytes = 1000
    info = directory.open(weight_budget=budget).info
    assert info.resident_weight_bytes == resident
    assert info.streamable_weight_bytes == (None if budget is None else 1000)
    # Where weights are streamed no CUDA graph is captured.
    assert info.cuda_graphs is (resident in (None, 1000))


def test_a_budget_for_an_engine_that_streams_nothing(directory: Directory) -> None:
    directory.engine_of(BuildOptions())
    with refused(ManifestError, directory.engine, "--weight-streaming"):
        directory.open(weight_budget=300)


def test_a_budget_that_tensorrt_refuses(directory: Directory) -> None:
    directory.engine_of(BuildOptions(weight_streaming=True))
    directory.machine.trt.streamable_bytes = 1000
    directory.machine.trt.fail = "weight_streaming_budget_v2"
    with refused(BackendError, 300):
        directory.open(weight_budget=300)
    assert directory.machine.holds_nothing()


@pytest.mark.parametrize("budget", [-1, "all", 1.5])
def test_what_is_no_budget(budget: Any) -> None:
    with refused(BackendError, "weight_budget", repr(budget)):
        BackendOptions(weight_budget=budget)
