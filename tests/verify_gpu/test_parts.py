"""`verify-gpu` after the kernels, on the stand-ins: right engines pass, each fault is found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from mmvision_export.artifacts.engine_record import EngineAttention, EngineRecord
from mmvision_export.artifacts.profile import Profile, profiles_from_buckets, profiles_from_slots
from mmvision_export.core.errors import BackendError, EngineError, InputError
from mmvision_export.core.metrics import Metrics
from mmvision_export.core.progress import Progress
from mmvision_export.parity.samples import samples_from_grids
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.runtime.backends.tensorrt_rtx import TensorRTRTXBackend
from mmvision_export.verify_gpu import arrays, clocks
from mmvision_export.verify_gpu.arrays import check_arrays
from mmvision_export.verify_gpu.budget import SHARES, Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, filling_batch
from mmvision_export.verify_gpu.captures import check_captures
from mmvision_export.verify_gpu.engines import check_engine
from mmvision_export.verify_gpu.findings import Finding, Findings, Status
from mmvision_export.verify_gpu.latency import check_latency
from mmvision_export.verify_gpu.leaks import HANDLES, check_leaks
from mmvision_export.verify_gpu.reference import Reference
from mmvision_export.verify_gpu.refusals import check_refusals
from mmvision_export.verify_gpu.runtime_cache import check_runtime_cache
from mmvision_export.verify_gpu.sanitizer import check_sanitizer
from mmvision_export.verify_gpu.whole import check_model
from tests.support.configs import HEAD_DIM_80
from tests.support.engines import write_engine
from tests.support.errors import refused
from tests.support.fake_driver import (
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.fake_gpu import Cache, TensorRT, expected_embeds

BUCKETS = profiles_from_buckets([64, 2048], [40], HEAD_DIM_80)
DYNAMIC = [Profile(min_patches=4, opt_patches=64, max_patches=2048, max_images=40)]
KINDS: dict[str, type[TensorRTBackend]] = {
    "tensorrt": TensorRTBackend,
    "tensorrt-rtx": TensorRTRTXBackend,
}


class Bench:
    """An engine on the stand-ins, and what the parts need beside it."""

    def __init__(
        self,
        driver: FakeDriver,
        folder: Path,
        kind: str,
        profiles: Sequence[Profile],
        **changes: Any,
    ) -> None:
        limits = [
            {
                "pixel_values": (p.min_patches, p.max_patches),
                "grid_thw": (p.min_images, p.max_images),
            }
            for p in profiles
        ]
        self.driver, self.cuda = driver, driver.cuda()
        self.trt = TensorRT(driver, HEAD_DIM_80.text_hidden_size, limits)
        path = write_engine(
            folder, config=HEAD_DIM_80, backend=kind, profiles=tuple(profiles), **changes
        )
        self.engine = BuiltEngine(kind, path, EngineRecord.read(path))
        self.findings = Findings({}, is_stand_in=False, tell=lambda _: None)
        self.budget = Budget(60)
        self.options = BackendOptions()
        self.opened = 0

    def open(self, path: Path, options: BackendOptions) -> TensorRTBackend:
        self.opened += 1
        # One driver for all, as a machine has, so that its count of handles is of all.
        return KINDS[self.engine.record.backend](
            path, options, module=self.trt, cuda=Cuda(0, self.cuda.driver), manifest=None
        )

    def run(self, part: Any, *more: Any, **options: Any) -> None:
        part(
            [self.engine],
            *more,
            self.findings,
            self.budget,
            options=self.options,
            opener=self.open,
            **options,
        )

    def check(self, reference: Reference) -> None:
        check_engine(self.engine, reference, self.findings, options=self.options, opener=self.open)

    def statuses(self) -> list[Status]:
        return [finding.status for finding in self.findings.findings]

    def failed(self) -> Finding:
        (finding,) = [f for f in self.findings.findings if f.status == "FAIL"]
        return finding


@pytest.fixture(autouse=True)
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )


@pytest.fixture
def bench(fake_driver: FakeDriver, tmp_path: Path) -> Bench:  # noqa: F811
    return Bench(fake_driver, tmp_path / "e", "tensorrt", BUCKETS)


@pytest.fixture
def rtx(fake_driver: FakeDriver, tmp_path: Path) -> Bench:  # noqa: F811
    return Bench(fake_driver, tmp_path / "r", "tensorrt-rtx", DYNAMIC)


def reference() -> Reference:
    """What the stand-in computes, and a plausible rounding beside it."""
    samples = samples_from_grids(HEAD_DIM_80)
    width = HEAD_DIM_80.text_hidden_size
    rounding = Metrics(max_abs=1e-3, relative_l2=1e-3, min_cosine=1.0, non_finite=0)
    return Reference(
        samples,
        {s.name: expected_embeds(s.pixel_values, width).astype(np.float32) for s in samples},
        {s.name: rounding for s in samples},
    )


def test_right_engines_pass_parity(bench: Bench, rtx: Bench) -> None:
    for one in (bench, rtx):
        one.check(reference())
        assert one.statuses() == ["pass"] * len(reference().samples)
        assert all(f.numbers["limit_relative_l2"] == 2e-3 for f in one.findings.findings)
        assert one.driver.holds_nothing()


@pytest.mark.parametrize("fault", ["one value", "one token", "NaN"])
def test_an_engine_that_gives_wrong_numbers_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def wrong(pixels: np.ndarray, width: int) -> np.ndarray:
        right = expected_embeds(pixels, width)
        if fault == "one token":
            right[-1] = -right[-1]
        else:
            right[0, 0] += {"one value": 8.0, "NaN": np.nan}[fault]
        return right

    given = dataclasses.replace(reference(), samples=reference().samples[:1])
    # Launches are padded to the bucket, so that the last token would be the padding's.
    one_image = given.samples[0].num_patches
    bench = Bench(bench.driver, bench.engine.path.parent / "f", "tensorrt", exactly(one_image))
    monkeypatch.setattr("tests.support.fake_gpu.expected_embeds", wrong)
    bench.check(given)
    assert bench.failed().case == "tensorrt, one image"
    assert bench.driver.holds_nothing()


def exactly(patches: int) -> list[Profile]:
    return [Profile(min_patches=patches, opt_patches=patches, max_patches=patches, max_images=8)]


def test_an_engine_that_does_not_open_is_a_finding(bench: Bench) -> None:
    bench.trt.fail = "deserialize_cuda_engine"
    bench.check(reference())
    assert "reason of deserialize_cuda_engine" in str(bench.failed().detail)
    assert bench.driver.holds_nothing()


def test_buckets_are_captured_and_replayed(bench: Bench) -> None:
    bench.run(check_captures)
    assert [(f.case, f.status) for f in bench.findings.findings] == [
        ("tensorrt, 64 patches, 16 rows", "pass"),
        ("tensorrt, 2048 patches, 41 rows", "pass"),
    ]
    assert bench.driver.count("cuGraphLaunch") == 6
    assert bench.driver.holds_nothing()


def test_slots_are_filled_captured_and_replayed(
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
) -> None:
    """An image in each slot goes through the slots' own graph; one image more is refused."""
    slots = profiles_from_slots([(1, 64), (4, 64)], 2, HEAD_DIM_80)
    attention = EngineAttention(way="uniform", body="attention", fused=True)
    bench = Bench(fake_driver, tmp_path / "s", "tensorrt", slots, attention=attention)
    bench.trt.rows_per_slot = 2
    bench.run(check_captures)
    assert [(f.case, f.status) for f in bench.findings.findings] == [
        ("tensorrt, 1 slots of at most 64 patches", "pass"),
        ("tensorrt, 4 slots of at most 64 patches", "pass"),
    ]
    assert bench.driver.count("cuGraphLaunch") == 6
    bench.run(check_arrays, bench.cuda)
    bench.run(check_refusals, folder=tmp_path)
    assert "FAIL" not in bench.statuses()
    assert bench.driver.holds_nothing()


def test_a_refused_capture_fails_by_what_info_says(bench: Bench) -> None:
    bench.driver.refuse_captures()
    bench.run(check_captures)
    assert bench.statuses() == ["FAIL", "FAIL"]
    assert all("Cuda Runtime (900)" in str(f.detail) for f in bench.findings.findings)


def test_a_replay_that_runs_nothing_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "launch", lambda *_: None)
    bench.run(check_captures)
    assert bench.statuses() == ["FAIL", "FAIL"]


def test_a_replay_that_gives_other_bits_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = iter(range(100))

    def drifting(pixels: np.ndarray, width: int) -> np.ndarray:
        right = expected_embeds(pixels, width)
        right *= np.float16(1 + 2**-8 * next(launches))
        return right

    monkeypatch.setattr("tests.support.fake_gpu.expected_embeds", drifting)
    bench.run(check_captures)
    assert bench.statuses() == ["FAIL", "FAIL"]


def test_nothing_leaks(bench: Bench) -> None:
    bench.run(check_leaks, bench.cuda)
    (finding,) = bench.findings.findings
    assert finding.status == "pass", finding.line
    assert (finding.numbers["opens"], finding.numbers["calls"]) == (5, 100)
    assert finding.numbers["handles_more"] == finding.numbers["device_bytes_more"] == 0
    assert bench.opened == 6
    assert bench.driver.holds_nothing()


def test_every_handle_that_the_driver_makes_is_counted(bench: Bench) -> None:
    """A leak of each kind, by the stand-in's own count."""
    bench.run(check_captures)
    calls = bench.cuda.driver.calls
    for made, freed in HANDLES.items():
        assert calls[made] == calls[freed], made
    assert calls["cuStreamEndCapture"] > 0


@pytest.mark.parametrize("free", ["free_event", "free", "free_pinned", "free_graph"])
def test_a_leak_of_handles_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch, free: str) -> None:
    monkeypatch.setattr(Cuda, free, lambda *_: None)
    bench.run(check_leaks, bench.cuda)
    assert "handles_more" in str(bench.failed().detail)
    if free == "free":  # the largest profile's buffers, five times
        assert "device_bytes_more" in str(bench.failed().detail)


def test_a_leak_of_files_fails(bench: Bench, tmp_path: Path) -> None:
    held: list[BinaryIO] = []
    opens = bench.open

    def leaking(path: Path, options: BackendOptions) -> TensorRTBackend:
        held.append((tmp_path / str(len(held))).open("wb"))
        return opens(path, options)

    bench.open = leaking  # type: ignore[method-assign]
    bench.run(check_leaks, bench.cuda)
    for file in held:
        file.close()
    assert bench.failed().numbers["files_more"] == 5


def test_latency_has_percentiles_of_each_bucket(bench: Bench) -> None:
    bench.run(check_latency, bench.cuda)
    assert len(bench.findings.findings) == 2
    for finding in bench.findings.findings:
        p50, p90, p99 = (finding.numbers[f"p{p}_ms"] for p in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
        assert finding.detail == clocks.NOT_AVAILABLE
    bench.findings.is_stand_in = True
    bench.run(check_latency, bench.cuda)
    assert bench.statuses() == ["pass"] * 2 + ["launched"] * 2
    assert bench.driver.holds_nothing()


class Nvml:
    """NVML's library, of one device at a PCI address."""

    def __init__(self) -> None:
        self.is_shut_down = False

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        self.is_shut_down = True
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, device: Any) -> int:
        return 0 if bus == b"00000001:0a:00.0" else 6

    def nvmlDeviceGetClockInfo(self, device: Any, kind: Any, value: Any) -> int:
        value._obj.value = {1: 1410, 2: 1215}[kind.value]
        return 0

    def nvmlDeviceGetPowerUsage(self, device: Any, value: Any) -> int:
        value._obj.value = 61200
        return 0

    def nvmlDeviceGetTemperature(self, device: Any, sensor: Any, value: Any) -> int:
        return 3  # not supported


def test_clocks_by_nvml_of_the_device_that_cuda_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    address = {50: 1, 33: 10, 34: 0}
    monkeypatch.setattr(Cuda, "attribute", lambda _, number: address[number])
    monkeypatch.setattr(clocks, "_loaded", lambda: nvml)
    assert clocks.describe_clocks(bench.cuda) == "SM 1410 MHz, memory 1215 MHz, 61200 mW (NVML)"
    assert nvml.is_shut_down
    address[33] = 11
    assert clocks.describe_clocks(bench.cuda) == clocks.NOT_AVAILABLE


def test_clocks_of_a_jetson() -> None:
    # As JetPack 6 prints it.
    line = (
        "11-26-2026 02:00:00 RAM 3162/62841MB (lfb 2x4MB) CPU [0%@729,off] GR3D_FREQ 12%@[305,305] "
        "cpu@46.2C tboard@35C gpu@43.1C VDD_GPU_SOC 2405mW/2405mW VIN_SYS_5V0 3218mW/3218mW"
    )
    said = clocks.words_from_tegrastats(line)
    assert said is not None
    for word in ("GR3D_FREQ 12%@[305,305]", "gpu@43.1C", "VDD_GPU_SOC 2405mW"):
        assert word in said
    assert clocks.words_from_tegrastats("") is None


def test_arrays_on_the_device(bench: Bench) -> None:
    bench.run(check_arrays, bench.cuda)
    assert [(f.case, f.status) for f in bench.findings.findings] == [
        ("tensorrt, own stream", "pass"),
        ("tensorrt, torch", "not run"),
    ]
    assert bench.driver.holds_nothing()


def test_arrays_that_are_not_copied_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "on_device", lambda *_: None)
    bench.run(check_arrays, bench.cuda)
    assert bench.failed().case == "tensorrt, own stream"


def test_tensors_of_torch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch gives is compared too; tensors themselves are in the tests of the backend."""
    monkeypatch.setattr(arrays, "import_torch", lambda: object())
    width = HEAD_DIM_80.text_hidden_size

    def through(wrong: bool) -> Any:
        def tensors(_: Any, backend: TensorRTBackend, size: Profile) -> list[np.ndarray]:
            _, batch = filling_batch(backend, size, seed=0)
            right = expected_embeds(batch.pixel_values, width)
            return [right, right + 1 if wrong else right]

        return tensors

    for wrong in (False, True):
        monkeypatch.setattr(arrays, "_through_torch", through(wrong))
        bench.run(check_arrays, bench.cuda)
    assert bench.statuses() == ["pass", "pass", "pass", "FAIL"]


def test_refusals(bench: Bench, tmp_path: Path) -> None:
    bench.run(check_refusals, folder=tmp_path)
    assert bench.statuses() == ["pass", "pass"]
    assert "2052" in str(bench.findings.findings[0].detail)
    assert bench.driver.holds_nothing()


def test_what_is_not_refused_fails(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = dataclasses.replace(bench.engine.record, profiles=tuple(BUCKETS[:1]))
    bench.engine = dataclasses.replace(bench.engine, record=record)
    whole = "mmvision_export.verify_gpu.refusals._with_one_byte_more"
    copy = write_engine(
        tmp_path / "copy", config=HEAD_DIM_80, backend="tensorrt", profiles=tuple(BUCKETS)
    )
    monkeypatch.setattr(whole, lambda engine, folder: copy)
    bench.run(check_refusals, folder=tmp_path)
    assert bench.statuses() == ["FAIL", "FAIL"]


def test_the_runtime_cache(rtx: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx.run(check_runtime_cache)
    assert rtx.statuses() == ["pass"]
    monkeypatch.setattr(Cache, "deserialize", lambda *_: False)
    rtx.run(check_runtime_cache)
    assert "not used" in str(rtx.failed().detail)


@pytest.mark.parametrize(("code", "status"), [(0, "pass"), (99, "FAIL")])
def test_the_sanitizer(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: Status
) -> None:
    program = tmp_path / "compute-sanitizer"
    said = "========= Invalid __global__ read of size 2 bytes"
    lines = ["#!/bin/sh", f'echo "$@" > {tmp_path}/arguments', f"echo '{said}'", f"exit {code}"]
    program.write_text("\n".join([*lines, ""]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check_sanitizer([bench.engine], bench.findings, bench.budget)
    assert bench.statuses() == [status]
    assert (said in str(bench.findings.findings[0].detail)) == bool(code)
    assert str(bench.engine.path) in (tmp_path / "arguments").read_text()


def test_without_the_sanitizer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    check_sanitizer([bench.engine], bench.findings, bench.budget)
    assert bench.statuses() == ["not run"]


def test_what_a_part_leaves_is_for_those_after_it() -> None:
    now = 100.0
    budget = Budget(10, now=lambda: now)
    assert budget.seconds_left("kernels") == pytest.approx(600 * SHARES["kernels"])
    now += 61
    assert budget.is_spent("kernels")
    assert not budget.is_spent("engines")
    now = 100 + 599
    assert budget.is_spent("latency")
    assert budget.seconds_left("sanitizer") == pytest.approx(1)
    assert sum(SHARES.values()) == pytest.approx(1)
    with refused(InputError, "--budget-minutes", 0):
        Budget(0)


@pytest.mark.parametrize("part", [check_captures, check_leaks, check_latency, check_arrays])
def test_no_part_begins_anything_without_time(bench: Bench, part: Any) -> None:
    bench.budget = Budget(1, now=iter([0.0, *[1e6] * 99]).__next__)
    bench.run(part, *([] if part is check_captures else [bench.cuda]))
    assert set(bench.statuses()) == {"not run"}
    assert bench.opened == 0


def test_a_part_that_breaks_does_not_cost_the_next(
    bench: Bench, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr("mmvision_export.verify_gpu.whole._engines", lambda *_: [bench.engine])
    monkeypatch.setattr("mmvision_export.verify_gpu.whole.check_leaks", broken)
    monkeypatch.setenv("PATH", "")
    folder, output = tmp_path / "work", tmp_path / "out"
    for each in (folder, output):
        each.mkdir()
    check_model(
        exported,
        bench.cuda,
        bench.findings,
        bench.budget,
        folder=folder,
        output=output,
        progress=Progress(),
        opener=bench.open,
    )
    assert (bench.failed().part, bench.failed().case) == ("leaks", "all")
    assert "nobody foresaw this" in str(bench.failed().detail)
    report = json.loads((output / "verify-gpu.json").read_text())
    parts = list(dict.fromkeys(finding["part"] for finding in report["findings"]))
    assert parts == [p for p in SHARES if p not in ("kernels", "engines", "runtime cache")]
    assert bench.driver.holds_nothing()


def test_without_an_engine_the_rest_is_not_run(
    bench: Bench, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> list[BuiltEngine]:
        raise EngineError("no engine today")

    monkeypatch.setattr("mmvision_export.verify_gpu.whole._engines", fails)
    check_model(
        exported,
        bench.cuda,
        bench.findings,
        bench.budget,
        folder=tmp_path,
        output=tmp_path,
        progress=Progress(),
    )
    assert bench.failed().detail == "no engine today"
    assert bench.statuses() == ["FAIL", *["not run"] * (len(SHARES) - 2)]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    findings = Findings({}, is_stand_in=False, tell=lambda _: None)
    findings.judge("engines", "x", ["not finite"], {"relative_l2": float("nan")})
    assert "relative_l2 nan" in findings.findings[0].line
    findings.write(tmp_path)

    def never(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "verify-gpu.json").read_text()
    report = json.loads(text, parse_constant=never)
    assert report["findings"][0]["numbers"] == {"relative_l2": None}


def test_an_interrupt_passes() -> None:
    findings = Findings({}, is_stand_in=False, tell=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        with findings.failure_is_a_finding("engines", "x"):
            raise KeyboardInterrupt
    with findings.failure_is_a_finding("engines", "x"):
        raise BackendError("kept")
    assert [f.detail for f in findings.findings] == ["kept"]
