"""What `verify-gpu` builds, and what it holds it to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, EngineError
from mmvision_export.core.progress import Progress
from mmvision_export.parity.samples import samples_from_grids
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine
from mmvision_export.verify_gpu.engines import (
    EngineCase,
    ImpossibleError,
    build_engines,
    build_in,
    check_engine,
    engine_sizes,
)
from mmvision_export.verify_gpu.findings import Findings
from mmvision_export.verify_gpu.reference import (
    Reference,
    engine_precision,
    reference_from_directory,
)
from mmvision_export.verify_gpu.whole import model_copy
from tests.support.configs import HEAD_DIM_80
from tests.support.engines import write_engine

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)
OPTIONS = ("stripped", "stripped, refit", "streaming", "version-compatible", "ampere-plus")
SIZES = {"dynamic": [PROFILE], "slots": [PROFILE], "buckets": [PROFILE]}


@pytest.fixture
def findings() -> Findings:
    return Findings({}, is_stand_in=False, tell=lambda _: None)


def only_tensorrt(backend: str) -> None:
    if backend != "tensorrt":
        raise BackendError(f"{backend} is not installed")


def test_a_build_that_fails_does_not_cost_the_next(findings: Findings, tmp_path: Path) -> None:
    asked = []

    def build(case: EngineCase, _: Sequence[Profile]) -> tuple[Path, EngineRecord]:
        asked.append(case.name)
        if case.way == "plugin":
            raise ImpossibleError("there is no library")
        if case.way == "packed":
            raise RuntimeError("the builder\ncrashed")
        path = write_engine(tmp_path)
        return path, EngineRecord.read(path)

    built = list(
        build_engines(findings, Budget(60), sizes=SIZES, build=build, is_installed=only_tensorrt)
    )
    assert [engine.name for engine in built] == [
        "tensorrt, native, buckets",
        "tensorrt, uniform, slots",
        "tensorrt, native, dynamic",
        *(f"tensorrt, native, dynamic, {words}" for words in OPTIONS),
    ]
    assert len(asked) == 7 + len(OPTIONS)
    statuses = {f.case: (f.status, f.detail) for f in findings.findings}
    assert statuses["tensorrt-rtx"] == ("not run", "tensorrt-rtx is not installed")
    assert statuses["tensorrt, plugin, buckets"] == ("not run", "there is no library")
    status, detail = statuses["tensorrt, packed, dynamic, built"]
    assert (status, "the builder" in str(detail)) == ("FAIL", True)
    assert statuses["tensorrt, native, buckets, built"][0] == "pass"


@pytest.mark.parametrize("options", [BuildOptions(), BuildOptions(weight_streaming=True)])
def test_all_weights_that_can_be_are_streamed(
    findings: Findings, tmp_path: Path, options: BuildOptions
) -> None:
    budgets: list[Any] = []

    def opened(path: Path, given: BackendOptions) -> Any:
        budgets.append(given.weight_budget)
        raise BackendError("far enough")

    path = write_engine(tmp_path, options=options)
    engine = BuiltEngine("x", path, EngineRecord.read(path))
    check_engine(engine, Reference((), {}, {}), findings, options=BackendOptions(), opener=opened)
    assert budgets == [0 if options.weight_streaming else None]


def test_nothing_is_built_without_time(findings: Findings) -> None:
    def build(case: EngineCase, _: Sequence[Profile]) -> tuple[Path, EngineRecord]:
        raise AssertionError(case)

    budget = Budget(1, now=iter([0.0, *[1e6] * 99]).__next__)
    assert not list(
        build_engines(findings, budget, sizes=SIZES, build=build, is_installed=only_tensorrt)
    )
    assert {f.status for f in findings.findings} == {"not run"}


def test_the_sizes_are_those_that_the_documentation_names() -> None:
    sizes = engine_sizes(HEAD_DIM_80)
    assert [p.max_patches for p in sizes["buckets"]] == [256, 1024, 2304, 4096]
    assert all(profile.is_bucket for profile in sizes["buckets"])
    assert [p.max_patches for p in sizes["dynamic"]] == [4096]
    assert all(profile.rows_per_slot == 2 for profile in sizes["slots"])


def test_the_reference_leaves_the_model_directory_as_it_is(exported: Path, tmp_path: Path) -> None:
    before = sorted((f.name, f.stat().st_mtime_ns) for f in exported.rglob("*") if f.is_file())
    directory = model_copy(exported, tmp_path / "copy")
    samples = samples_from_grids(HEAD_DIM_80)[:2]
    reference = reference_from_directory(directory, samples=samples)
    assert "model.fp16.onnx" in Manifest.read(directory).files
    after = sorted((f.name, f.stat().st_mtime_ns) for f in exported.rglob("*") if f.is_file())
    assert after == before
    for sample in samples:
        assert np.isfinite(reference.expected[sample.name]).all()
        # What rounding to float16 costs a small encoder: far above float32's, far below a fault's.
        assert 1e-5 < reference.beside[sample.name].relative_l2 < 5e-3


def test_engines_are_built_as_build_engine_does(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    ada = Gpu(
        name="Ada", compute_capability=ComputeCapability(8, 9), multiprocessors=1, memory_bytes=1
    )
    monkeypatch.setattr("mmvision_export.engine.target.current_gpu", lambda _: ada)
    directory = model_copy(exported, tmp_path / "copy")
    precision = engine_precision(Manifest.read(directory))
    assert precision == "fp16"
    build = build_in(directory, precision, None, Progress())
    path, record = build(EngineCase("tensorrt-rtx", "native", "dynamic"), [PROFILE])
    assert path.name.endswith("-sm89-fp16.native-dynamic.engine")
    assert EngineRecord.read(path) == record
    record.verify(path)
    # Another engine of the same TensorRT leaves the first one's report of its layers in place.
    assert record.layers is not None
    layers = record.layers.file.content(path)
    slots = engine_sizes(HEAD_DIM_80)["slots"][:1]
    other, other_record = build(EngineCase("tensorrt-rtx", "uniform", "slots"), slots)
    assert other_record.layers is not None
    assert other_record.layers.file.content(other) != layers
    assert record.layers.file.content(path) == layers
    # TensorRT-RTX takes no plugins: that is no failure.
    with pytest.raises(ImpossibleError):
        build(EngineCase("tensorrt-rtx", "plugin", "dynamic"), [PROFILE])
    assert issubclass(ImpossibleError, EngineError)
    # Nor has it these options; a budget for weights needs no GPU to be built for.
    for options in (BuildOptions(version_compatible=True), BuildOptions(hardware="ampere-plus")):
        with pytest.raises(ImpossibleError, match="TensorRT-RTX"):
            build(EngineCase("tensorrt-rtx", "native", "dynamic", options), [PROFILE])
    case = EngineCase("tensorrt-rtx", "native", "dynamic", BuildOptions(weight_streaming=True))
    path, record = build(case, [PROFILE])
    assert path.name.endswith("-sm89-fp16-streaming.native-dynamic.engine")
    assert record.options == case.options
