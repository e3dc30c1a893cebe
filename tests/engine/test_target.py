"""The GPU that an engine is built on, with a stand-in for the driver: what is timed on it, and what names it."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, EngineError
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.builder import Plan, PlanRequest
from mmvision_export.runtime.backends.cuda import current_gpu
from mmvision_export.runtime.backends.cuda_driver import CudaDriver
from tests.support.configs import copy_of
from tests.support.errors import refused
from tests.support.fake_driver import (
    NO_DEVICE,
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)

VERSION = "10.13.3.9"


@pytest.fixture
def driver(
    fake_driver: FakeDriver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> FakeDriver:
    """This machine's driver, with an RTX 4090 of sorts as device 0 and an Orin as device 1."""
    fake_driver.library.fakeAddDevice(87, 1)
    monkeypatch.setattr(CudaDriver, "found", lambda: CudaDriver(fake_driver.library))
    return fake_driver


class Builds:
    """TensorRT as far as building asks for it: its version, and plans with what they were built for."""

    def __init__(self, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = driver
        self.requests: list[PlanRequest] = []
        self.contexts: list[int | None] = []
        module = types.ModuleType("tensorrt")
        module.__dict__.update(__version__=VERSION, Runtime=object)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", self.plan)

    def plan(self, request: PlanRequest, **_: Any) -> Plan:
        current = ctypes.c_void_p()
        self.driver.library.cuCtxGetCurrent(ctypes.byref(current))
        self.requests.append(request)
        self.contexts.append(current.value)
        assert request.timing_cache is not None
        request.timing_cache.path.write_bytes(b"timings")
        return Plan(b"plan", request.model)


def build(directory: Path, **options: Any) -> EngineRecord:
    _, record = build_engine(
        directory,
        Manifest.read(directory),
        profiles=[Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)],
        backend="tensorrt",
        attention="native",
        **options,
    )
    return record


def context_of(driver: FakeDriver, device: int) -> int | None:
    cuda = driver.cuda(device)
    cuda.use()
    current = ctypes.c_void_p()
    driver.library.cuCtxGetCurrent(ctypes.byref(current))
    cuda.close()
    return current.value


def test_kernels_are_timed_on_the_device_that_was_named(
    driver: FakeDriver, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = Builds(driver, monkeypatch)
    directory = copy_of(exported, tmp_path / "m")
    records = [build(directory, device=device) for device in (1, None)]
    assert builds.contexts == [context_of(driver, 1), context_of(driver, 0)]
    assert len(set(builds.contexts)) == 2
    assert [record.compute_capabilities for record in records] == [
        (ComputeCapability(8, 7),),
        (ComputeCapability(8, 9),),
    ]
    for record, device in zip(records, (1, 0), strict=True):
        assert record.gpu == driver.cuda(device).gpu() == current_gpu(device)
        assert record.gpu is not None
        assert record.gpu.compute_capability == record.compute_capabilities[0]
        name = f"tensorrt-{VERSION}-sm{record.gpu.compute_capability.sm}-fp32.engine"
        assert EngineRecord.read(directory / "plans" / name) == record
    # Timings of the one are not those of the other, nor the file without a GPU in its name.
    caches = [request.timing_cache for request in builds.requests]
    assert [cache.path.name for cache in caches if cache is not None] == [
        f"tensorrt-{VERSION}-{record.gpu.file_name}" for record in records if record.gpu
    ]
    assert len(set(caches)) == 2
    assert driver.holds_nothing()


def test_the_same_device_finds_its_timings_again(
    driver: FakeDriver, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = Builds(driver, monkeypatch)
    directory = copy_of(exported, tmp_path / "m")
    for _ in range(2):
        build(directory, device=1, force=True)
    first, second = (request.timing_cache for request in builds.requests)
    assert first == second


def test_a_failed_build_lets_the_device_go(
    driver: FakeDriver, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Builds(driver, monkeypatch)

    def plan(request: PlanRequest, **_: Any) -> Plan:
        raise EngineError("no plan")

    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    with refused(EngineError, "no plan"):
        build(copy_of(exported, tmp_path / "m"))
    assert driver.count("cuDevicePrimaryCtxRelease") == 1


def test_devices_that_are_not_there(
    driver: FakeDriver, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Builds(driver, monkeypatch)
    directory = copy_of(exported, tmp_path / "m")
    with refused(BackendError, "device 2", 2):
        build(directory, device=2)
    with refused(EngineError, "8.7", "8.9"):
        build(directory, device=1, compute_capabilities=[ComputeCapability(8, 9)])
    driver.fail("cuInit", NO_DEVICE)
    with pytest.raises(EngineError):
        build(directory, device=0)
    assert not list(directory.glob("plans/*"))


def test_rtx_builds_for_the_device_that_was_named(
    driver: FakeDriver, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    requests: list[PlanRequest] = []

    def plan(request: PlanRequest, **_: Any) -> Plan:
        requests.append(request)
        return Plan(b"plan", request.model)

    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    directory = copy_of(exported, tmp_path / "m")

    def build_rtx(**options: Any) -> EngineRecord:
        _, record = build_engine(
            directory,
            Manifest.read(directory),
            profiles=[Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)],
            backend="tensorrt-rtx",
            **options,
        )
        return record

    driver.set_device(sm=86, device=1)
    record = build_rtx(device=1)
    assert record.compute_capabilities == (ComputeCapability(8, 6),)
    # It times nothing: neither a file of timings nor a GPU that they would be of.
    assert (record.gpu, requests[0].timing_cache) == (None, None)
    with refused(EngineError, "8.9", "device 1"):
        build_rtx(device=1, compute_capabilities=[ComputeCapability(8, 9)])
    driver.fail("cuInit", NO_DEVICE)
    with refused(EngineError, "device 1"):
        build_rtx(device=1)


def test_the_driver_names_a_gpu(driver: FakeDriver) -> None:
    assert current_gpu(1) == Gpu(
        name="stand-in",
        compute_capability=ComputeCapability(8, 7),
        multiprocessors=1,
        memory_bytes=2**30,
    )
    with refused(BackendError, "device 7", 2):
        current_gpu(7)
    driver.fail("cuInit", NO_DEVICE)
    assert current_gpu() is None
