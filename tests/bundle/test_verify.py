"""`mmvision verify` names what is damaged, and says whether this machine computes the same."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.artifacts.engine_record import sidecar_path
from mmvision_export.artifacts.manifest import GRAPH
from mmvision_export.bundle.check import check_sample
from mmvision_export.bundle.integrity import verify_files
from mmvision_export.bundle.record import BUNDLE, SAMPLE_FILES, BundleRecord
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.trust import UntrustedError
from tests.support.command import Command
from tests.support.engines import write_engine
from tests.support.errors import refused


@pytest.fixture
def unpacked(cpu_archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(cpu_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / cpu_archive.stem


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_whole_bundle_passes_packed_and_unpacked(cpu_archive: Path, unpacked: Path) -> None:
    packed, folder = verify_files(cpu_archive), verify_files(unpacked)
    assert packed.problems == folder.problems == {}
    assert packed.record == folder.record
    assert packed.files == folder.files == sum(path.is_file() for path in unpacked.rglob("*"))


def test_a_flipped_byte_of_any_file_is_named(unpacked: Path) -> None:
    random = np.random.default_rng(0)
    record = BundleRecord.read(unpacked)
    for name in [*record.files, BUNDLE]:
        path = unpacked / name
        for position in {0, path.stat().st_size - 1, int(random.integers(path.stat().st_size))}:
            flip(path, position)
            assert list(verify_files(unpacked).problems) == [name], position
            flip(path, position)
    assert not verify_files(unpacked).problems


def test_a_flipped_byte_anywhere_in_the_archive_is_found(cpu_archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.tar"
    shutil.copyfile(cpu_archive, copy)
    for position in np.random.default_rng(1).integers(0, copy.stat().st_size, 40).tolist():
        flip(copy, position)
        assert len(verify_files(copy).problems) == 1, position
        flip(copy, position)
    assert not verify_files(copy).problems


def test_a_file_that_is_missing_a_link_or_a_fifo_is_named(unpacked: Path) -> None:
    (unpacked / "README.txt").unlink()
    (unpacked / "verify.sh").rename(unpacked / "other.sh")
    (unpacked / "verify.sh").symlink_to("other.sh")
    (unpacked / "install.sh").unlink()
    os.mkfifo(unpacked / "install.sh")
    assert set(verify_files(unpacked).problems) == {"README.txt", "verify.sh", "install.sh"}


def test_a_model_directory(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "small")
    engine = write_engine(model / "plans")
    assert not verify_files(model).problems
    companion = CompanionFile("x.refit.onnx", FileRecord.of(b"graph"))
    options = BuildOptions(strip_weights=True)
    write_engine(model / "plans", options=options, refit_graph=companion)
    assert set(verify_files(model).problems) == {f"plans/{companion.name}"}
    (engine.parent / companion.name).write_bytes(b"graph")
    assert not verify_files(model).problems
    flip(engine, 3)
    flip(model / f"{GRAPH}.data", 5)
    assert set(verify_files(model).problems) == {f"plans/{engine.name}", f"{GRAPH}.data"}
    flip(engine, 3)
    text = sidecar_path(engine).read_text()
    sidecar_path(engine).write_text(text.replace("fp16", "fp32", 1))
    sidecar = f"plans/{sidecar_path(engine).name}"
    assert set(verify_files(model).problems) == {sidecar, f"{GRAPH}.data"}
    sidecar_path(engine).unlink()
    assert set(verify_files(model).problems) == {f"plans/{engine.name}", f"{GRAPH}.data"}
    (model / "manifest.json").write_text("{}")
    assert set(verify_files(model).problems) == {"manifest.json"}
    with refused(ManifestError, tmp_path, reason="missing"):
        verify_files(tmp_path)


def test_the_command(unpacked: Path, cpu_archive: Path, mmvision: Command) -> None:
    good = mmvision("verify", str(unpacked), "--run", "--json")
    assert good.code == 0
    answer = json.loads(good.out)
    assert answer["kind"] == "verify"
    assert answer["passed"]
    assert answer["sample"]["backend"] == "onnxruntime-cpu"
    assert answer["sample"]["distance"]["relative_l2"] < 1e-5
    flip(unpacked / "model" / f"{GRAPH}.data", 7)
    bad = mmvision("verify", str(unpacked), "--run")
    assert bad.code == 1
    assert any(f"{GRAPH}.data" in line for line in bad.errors)
    assert "PASSED" not in bad.out
    assert mmvision("verify", str(cpu_archive), "--run").code == 2
    assert mmvision("verify", str(cpu_archive), "--build").code == 2


def test_other_embeddings_fail(unpacked: Path) -> None:
    record = BundleRecord.read(unpacked)
    assert not check_sample(unpacked, record).failures
    path = unpacked / SAMPLE_FILES[2]
    stored = np.load(path)
    np.save(path, stored * np.float32(1.0001))
    assert check_sample(unpacked, record).failures


class _Openings:
    """Opens on the CPU what the command would open on a GPU, after some refusals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors = list(errors)
        self._open = VisionEncoder.open
        self.trust: list[Any] = []
        monkeypatch.setattr(VisionEncoder, "open", self)

    def __call__(self, path: Path, *, trust: bool | None, **options: Any) -> VisionEncoder:
        self.trust.append(trust)
        if self.errors:
            raise self.errors.pop(0)
        return self._open(path, **{**options, "backend": "onnxruntime-cpu"})


def test_an_engine_is_built_where_none_fits(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = BundleRecord.read(unpacked)
    openings = _Openings(monkeypatch, ManifestError("plans holds no engine"))
    built: list[str] = []
    result = check_sample(
        unpacked, record, backend="tensorrt", trust=True, build=lambda: built.append("once")
    )
    assert built == ["once"]
    assert not result.failures
    assert openings.trust == [True, True]


@pytest.mark.parametrize(
    "error", [UntrustedError("not yours"), BackendError("there is no CUDA driver")]
)
def test_nothing_is_built_where_building_does_not_help(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _Openings(monkeypatch, error)
    built: list[str] = []
    with pytest.raises(type(error)):
        check_sample(
            unpacked,
            BundleRecord.read(unpacked),
            backend="tensorrt",
            build=lambda: built.append("once"),
        )
    assert built == []


def test_without_build_the_reason_is_said(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Openings(monkeypatch, ManifestError("plans holds no engine"))
    with refused(ManifestError, "no engine"):
        check_sample(unpacked, BundleRecord.read(unpacked), backend="tensorrt")
