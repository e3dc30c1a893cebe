"""What goes into a bundle: what its target needs, once, and the same bytes each time."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.companion_file import CompanionFile, PluginFile
from mmvision_export.artifacts.deployment import DEPLOYMENTS, DeploymentName
from mmvision_export.artifacts.engine_record import GraphRecord
from mmvision_export.artifacts.library_record import library_record_path
from mmvision_export.artifacts.manifest import CPU_GRAPH, GRAPH, Manifest
from mmvision_export.artifacts.plugin_library import LIBRARY, PluginLibraryRecord
from mmvision_export.bundle.pack import Bundle, write_bundle
from mmvision_export.core.errors import InputError, ManifestError, OutputError
from mmvision_export.core.files import FileRecord, file_record
from tests.support.command import Command
from tests.support.engines import ENGINE, write_engine
from tests.support.errors import refused


def written(directory: Path, output: Path, target: DeploymentName, **options: Any) -> Bundle:
    manifest = Manifest.read(directory)
    return write_bundle(directory, manifest, output, DEPLOYMENTS[target], **options)


def of_graph(directory: Path, name: str = GRAPH) -> GraphRecord:
    files = Manifest.read(directory).files
    return GraphRecord(
        name=name, sha256=files[name].sha256, data_sha256=files[f"{GRAPH}.data"].sha256
    )


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "small")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libraries" / LIBRARY
    path.parent.mkdir()
    path.write_bytes(b"a library")
    PluginLibraryRecord(
        library=file_record(path),
        machine="aarch64",
        versions={},
        sms=[87],
        head_dims=[80],
        dtypes=["fp16"],
    ).write(library_record_path(path))
    return path


def test_the_same_model_gives_the_same_bytes(
    cpu_archive: Path, exported: Path, tmp_path: Path
) -> None:
    again = tmp_path / cpu_archive.name
    written(exported, again, "cpu")
    assert again.read_bytes() == cpu_archive.read_bytes()


def test_another_model_gives_others(cpu_archive: Path, model: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(model)
    dataclasses.replace(manifest, created="2026-01-01T00:00:00+00:00").write(model)
    again = tmp_path / cpu_archive.name
    written(model, again, "cpu")
    assert again.read_bytes() != cpu_archive.read_bytes()


def test_a_cpu_gets_every_graph_and_the_weights_once(cpu_archive: Path, exported: Path) -> None:
    with tarfile.open(cpu_archive) as archive:
        names = archive.getnames()
        archive.extractall(cpu_archive.parent / "all", filter="data")
    data = Manifest.read(exported).files[f"{GRAPH}.data"]
    model = cpu_archive.parent / "all" / "small-cpu" / "model"
    inside = Manifest.read(model)
    assert {GRAPH, CPU_GRAPH, f"{GRAPH}.data", "preprocessor_config.json"} <= set(inside.files)
    inside.verify(model, inside.files)
    sizes = [path.stat().st_size for path in model.rglob("*") if path.is_file()]
    assert [size for size in sizes if size >= data.size_bytes] == [data.size_bytes]
    assert sum(name.endswith(".whl") for name in names) == 1


def test_an_engine_goes_to_where_it_is_valid(model: Path, tmp_path: Path) -> None:
    write_engine(model / "plans", graph=of_graph(model))
    rtx = written(model, tmp_path / "rtx.tar", "rtx")
    assert rtx.engines == [ENGINE]
    assert f"model/plans/{ENGINE}" in rtx.record.files
    # With what belongs to it.
    graph = model / "plans" / "x.refit.onnx"
    graph.write_bytes(b"graph")
    options = BuildOptions(strip_weights=True)
    companion = CompanionFile(graph.name, FileRecord.of(b"graph"))
    write_engine(model / "plans", graph=of_graph(model), options=options, refit_graph=companion)
    with_it = written(model, tmp_path / "stripped.tar", "rtx")
    assert f"model/plans/{graph.name}" in with_it.record.files
    write_engine(model / "plans", graph=of_graph(model))
    # The controls: another TensorRT, another CPU, another precision, another graph.
    assert written(model, tmp_path / "dgpu.tar", "dgpu").engines == []
    assert written(model, tmp_path / "arm.tar", "rtx", machine="aarch64").engines == []
    assert written(model, tmp_path / "fp32.tar", "rtx", precision="fp32").engines == []
    write_engine(model / "plans")
    assert written(model, tmp_path / "graph.tar", "rtx").engines == []
    # The graphs of two checkpoints are one file: the weights tell them apart.
    other = dataclasses.replace(of_graph(model), data_sha256="1" * 64)
    write_engine(model / "plans", graph=other)
    assert written(model, tmp_path / "weights.tar", "rtx").engines == []
    options = BuildOptions(refit=True)
    write_engine(model / "plans", graph=other, options=options, refit_graph=companion)
    assert written(model, tmp_path / "refit.tar", "rtx").engines == [ENGINE]


def test_an_engine_keeps_its_verdict(model: Path, tmp_path: Path) -> None:
    write_engine(model / "plans", graph=of_graph(model))
    name = f"plans/{ENGINE}"
    Manifest.read(model).update(model, parity={name: {"passed": True}, "plans/x": {"passed": True}})
    bundle = written(model, tmp_path / "rtx.tar", "rtx")
    with tarfile.open(bundle.path) as archive:
        archive.extractall(tmp_path, filter="data")
    assert set(Manifest.read(tmp_path / "rtx" / "model").parity) == {name}


def test_what_lies_beside_an_engine_is_verified(model: Path, tmp_path: Path) -> None:
    library = PluginFile.of(FileRecord.of(b"a library"))
    write_engine(model / "plans", graph=of_graph(model), plugin_library=library)
    path = model / "plans" / library.name
    with refused(ManifestError, path):
        written(model, tmp_path / "x.tar", "rtx")
    path.write_bytes(b"another 1")
    with refused(ManifestError, path):
        written(model, tmp_path / "x.tar", "rtx")
    path.write_bytes(b"a library")  # the control
    assert f"model/plans/{library.name}" in written(model, tmp_path / "x.tar", "rtx").record.files


def test_the_library_of_the_targets_gpu_comes_along(
    model: Path, library: Path, tmp_path: Path
) -> None:
    orin = written(model, tmp_path / "orin.tar", "jetson-orin", plugin_library=library)
    assert f"plugins/{LIBRARY}" in orin.record.files
    assert orin.record.machine == "aarch64"
    with refused(ManifestError, library, "aarch64", "x86_64"):
        written(model, tmp_path / "x.tar", "dgpu", plugin_library=library)
    with refused(ManifestError, library, "8.7"):
        written(model, tmp_path / "x.tar", "jetson-thor", plugin_library=library)
    library.write_bytes(b"another one")
    with refused(ManifestError, library):
        written(model, tmp_path / "x.tar", "jetson-orin", plugin_library=library)


def test_a_graph_that_failed_its_comparison_is_not_shipped(model: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(model)
    manifest.update(model, parity={GRAPH: {"passed": False}})
    with refused(ManifestError, GRAPH):
        written(model, tmp_path / "x.tar", "cpu")
    assert not (tmp_path / "x.tar").exists()


def test_a_damaged_model_is_not_shipped(model: Path, tmp_path: Path) -> None:
    data = model / f"{GRAPH}.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with refused(ManifestError, data):
        written(model, tmp_path / "x.tar", "cpu")


def test_a_fifo_in_place_of_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    import os

    (model / CPU_GRAPH).unlink()
    os.mkfifo(model / CPU_GRAPH)
    with refused(ManifestError, model / CPU_GRAPH, reason="unsafe"):
        written(model, tmp_path / "x.tar", "cpu")


def test_packages_for_a_target_without_a_network(exported: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with refused(InputError, wheels):
        written(exported, tmp_path / "x.tar", "cpu", wheels=wheels)
    (wheels / "numpy-2.0-py3-none-any.whl").write_bytes(b"numpy")
    (wheels / "mmvision_export-0.0-py3-none-any.whl").write_bytes(b"an older one")
    bundle = written(exported, tmp_path / "x.tar", "cpu", wheels=wheels)
    packages = [name for name in bundle.record.files if name.startswith("wheels/")]
    assert len(packages) == 2
    assert bundle.record.files["wheels/numpy-2.0-py3-none-any.whl"] == FileRecord.of(b"numpy")
    with tarfile.open(bundle.path) as archive:
        member = archive.extractfile("x/install.sh")
        assert member is not None
        assert b"--no-index" in member.read()


def test_what_is_there_is_replaced_only_when_told_to(
    exported: Path, tmp_path: Path, mmvision: Command
) -> None:
    options = ["bundle", "--target", "cpu", "--model", str(exported), "--output", "x.tar"]
    assert mmvision(*options).code == 0
    again = mmvision(*options)
    assert again.code == 1
    assert "--force" in again.err
    assert mmvision(*options, "--force").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("name", ["x.zip", "x", "a" * 80 + ".tar"])
def test_a_name_that_is_none_is_refused_before_the_work(
    exported: Path, tmp_path: Path, name: str
) -> None:
    with refused(OutputError):
        written(exported, tmp_path / name, "cpu")


def test_options_of_an_engine_do_not_go_with_a_cpu(exported: Path, mmvision: Command) -> None:
    for option in (["--fp16"], ["--buckets", "256"], ["--machine", "x86_64"]):
        result = mmvision(
            "bundle", "--target", "cpu", "--model", str(exported), "--output", "x.tar", *option
        )
        assert result.code == 2
