"""`verify-gpu`: what is carried to a GPU finds what is wrong there. The stand-in's launches compute here."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.verify_gpu.budget import SHARES
from mmvision_export.verify_gpu.cases import (
    DTYPES,
    bits_from_float,
    float_from_bits,
    relative_l2,
    sample_cases,
)
from mmvision_export.verify_gpu.check import KernelFinding, check_kernels
from mmvision_export.verify_gpu.findings import Findings
from mmvision_export.verify_gpu.launch import wrong_inputs
from mmvision_export.verify_gpu.pack import MAX_PACK_BYTES, write_pack
from mmvision_export.verify_gpu.pack_file import Pack, kernel_for
from tests.support.command import Command
from tests.support.errors import refused
from tests.support.fake_driver import (
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.tools import once

pytest.importorskip("triton", reason="triton is not installed")
torch = pytest.importorskip("torch")

HEAD_DIM = 80
ORIN = ComputeCapability(8, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, made once for all worker processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def make(new: Path) -> None:
        size = write_pack(new / "pack", compute_capabilities=[ORIN, ComputeCapability(9, 0)])
        assert size < MAX_PACK_BYTES / 2  # all GPUs are in the whole one

    return once(shared / "verify-gpu-pack", make) / "pack"


@pytest.fixture(autouse=True)
def few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of the stand-in mean nothing: a few are enough to see that they are taken."""
    monkeypatch.setattr("mmvision_export.verify_gpu.launch._REPEATS", 2)
    monkeypatch.setattr("mmvision_export.verify_gpu.launch._LAUNCHES", 2)


@pytest.fixture(scope="module")
def pack(folder: Path) -> Pack:
    return Pack.read(folder)


class Kernels:
    """What the kernels compute, by other means, when the stand-in comes to their launch.

    `fault` is what a wrong kernel would do.
    """

    def __init__(self, driver: FakeDriver, dtype: str, fault: str = "") -> None:
        self.driver, self.dtype, self.fault = driver, dtype, fault

    def __call__(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[int]
    ) -> None:
        run = self.attention if "attention" in name else self.rotary
        run(grid, [ctypes.c_uint64.from_address(a).value for a in arguments], arguments)

    def array(self, address: int, shape: tuple[int, ...], kind: Any = np.uint16) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        values: np.ndarray = self.driver.region(address, size).view(kind)
        return values.reshape(shape)

    def attention(self, grid: tuple[int, ...], words: list[int], arguments: list[int]) -> None:
        segments = ctypes.c_int32.from_address(arguments[6]).value
        stride = ctypes.c_int32.from_address(arguments[7]).value
        scale = ctypes.c_float.from_address(arguments[8]).value * np.log(2)
        bounds = self.array(words[3], (segments + 1,), np.int32)
        shape = (int(bounds[-1]), grid[1], stride // grid[1])
        q, k, v = (float_from_bits(self.array(w, shape), self.dtype) for w in words[:3])
        out = np.zeros(shape)
        for start, end in itertools.pairwise(bounds):
            if end == start:
                continue
            end_of_keys = end - (self.fault == "last key" and end - start > 64)
            scores = np.einsum("qhd,khd->hqk", q[start:end], k[start:end_of_keys]) * scale
            if self.fault == "no scale":
                scores /= scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[start:end] = np.einsum("hqk,khd->qhd", weights, v[start:end_of_keys])
        rows = len(out) - (self.fault == "last row")
        self.array(words[4], shape)[:rows] = bits_from_float(out, self.dtype)[:rows]

    def rotary(self, grid: tuple[int, ...], words: list[int], arguments: list[int]) -> None:
        n, heads, dim, half = (
            ctypes.c_int32.from_address(arguments[i]).value for i in range(6, 10)
        )
        cos, sin = (self.array(w, (n, half), np.float32)[:, None, :] for w in words[2:4])
        if self.fault == "sign":
            sin = -sin
        for source, target in ((words[0], words[4]), (words[1], words[5])):
            x = float_from_bits(self.array(source, (n, heads, dim)), self.dtype)
            a, b = x[..., :half], x[..., half : 2 * half]
            out = np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)
            self.array(target, (n, heads, dim))[:] = bits_from_float(out, self.dtype)


def run(
    pack: Pack,
    folder: Path,
    driver: FakeDriver,
    keep: Callable[[Any], bool],
    fault: str = "",
    dtype: str = "fp16",
) -> Findings:
    driver.set_device(sm=87, is_integrated=True)
    driver.on_launch(Kernels(driver, dtype, fault))
    cases = [case for case in pack.cases if case.dtype == dtype and keep(case)]
    assert cases
    findings = Findings({}, is_stand_in=True, tell=lambda _: None)
    check_kernels(
        dataclasses.replace(pack, cases=cases), folder, driver.cuda(), findings, computes=True
    )
    return findings


def kernels(findings: Findings) -> list[KernelFinding]:
    assert all(isinstance(finding, KernelFinding) for finding in findings.findings)
    return [f for f in findings.findings if isinstance(f, KernelFinding)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass_plain_and_captured_with_controls_and_times(
    pack: Pack,
    folder: Path,
    fake_driver: FakeDriver,  # noqa: F811
    dtype: str,
) -> None:
    findings = run(pack, folder, fake_driver, lambda case: case.name != "long", dtype=dtype)
    assert findings.failed == 0, [f.line for f in kernels(findings) if f.status == "FAIL"]
    for how in ("plain", "graph"):
        found = [f for f in kernels(findings) if f.how == how]
        assert len(found) == len(kernels(findings)) - len(found) - sum(
            f.how == "control" for f in kernels(findings)
        )
        assert all(f.numbers["median_us"] > 0 for f in found)
    for op in ("varlen_attention", "qk_rotary_embedding"):
        assert any((f.op, f.how) == (op, "control") for f in kernels(findings))
    assert fake_driver.holds_nothing()


@pytest.mark.parametrize(
    ("fault", "op"),
    [
        ("last key", "varlen_attention"),
        ("no scale", "varlen_attention"),
        ("last row", "varlen_attention"),
        ("sign", "qk_rotary_embedding"),
    ],
)
def test_wrong_kernels_fail(
    pack: Pack,
    folder: Path,
    fake_driver: FakeDriver,  # noqa: F811
    fault: str,
    op: str,
) -> None:
    findings = run(
        pack,
        folder,
        fake_driver,
        lambda c: c.op == op and c.name in ("around a tile", "many"),
        fault,
    )
    assert {f.how for f in kernels(findings) if f.status == "FAIL"} >= {"plain", "graph"}


def test_a_control_that_is_not_refused_fails(
    pack: Pack,
    folder: Path,
    fake_driver: FakeDriver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmvision_export.verify_gpu.check.wrong_inputs", lambda case: case.inputs)
    findings = run(pack, folder, fake_driver, lambda case: case.name == "primes")
    assert [f.how for f in kernels(findings) if f.status == "FAIL"] == ["control"]


def test_what_the_driver_refuses_is_a_finding_and_nothing_leaks(
    pack: Pack,
    folder: Path,
    fake_driver: FakeDriver,  # noqa: F811
) -> None:
    fake_driver.refuse_captures()
    findings = run(pack, folder, fake_driver, lambda case: case.name == "primes")
    (failed,) = [f for f in kernels(findings) if f.status == "FAIL"]
    assert failed.how == "graph"
    assert "CUDA_ERROR_STREAM_CAPTURE" in str(failed.detail)
    assert fake_driver.holds_nothing()


def test_expected_results_are_those_of_torch_in_float64() -> None:
    for case in sample_cases(HEAD_DIM):
        if case.op != "varlen_attention":
            continue
        q, k, v = (
            torch.from_numpy(float_from_bits(x, case.dtype)).transpose(0, 1)
            for x in case.inputs[:3]
        )
        out = np.empty_like(case.expected[0])
        for start, end in itertools.pairwise(case.inputs[3]):
            part = (x[:, start:end] for x in (q, k, v))
            attention = torch.nn.functional.scaled_dot_product_attention(
                *part, scale=case.scalars["scale"]
            )
            out[start:end] = attention.transpose(0, 1).numpy()
        assert relative_l2(out, case.expected[0]) < 1e-12, case.name
        # What is allowed is a few roundings of the type, and the control is far beyond it.
        assert case.allowed[0] < {"fp16": 5e-3, "bf16": 5e-2}[case.dtype]
        assert (wrong_inputs(case) is None) == (len(np.unique(case.inputs[3])) == 2)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    ours = float_from_bits(bits_from_float(values, "bf16"), "bf16")
    np.testing.assert_array_equal(ours, torch.from_numpy(values).bfloat16().double().numpy())


@pytest.mark.parametrize(
    ("sm", "is_integrated", "taken"),
    [
        (87, True, (87, "exact")),
        (86, False, (80, "same_major")),
        (89, False, (80, "same_major")),
        (86, True, (80, "later")),
        (90, False, (90, "exact")),
        (120, False, (80, "later")),
    ],
)
def test_the_kernel_is_the_one_the_plugin_library_takes(
    pack: Pack, sm: int, is_integrated: bool, taken: tuple[int, str]
) -> None:
    kernel = kernel_for(
        pack.kernels,
        "varlen_attention",
        "fp16",
        compute_capability=ComputeCapability.from_sm(sm),
        is_integrated=is_integrated,
    )
    assert (kernel.sm, kernel.reach) == taken


def test_a_gpu_without_a_kernel_is_refused(pack: Pack) -> None:
    with refused(InputError, "varlen_attention", "7.5"):
        kernel_for(
            pack.kernels,
            "varlen_attention",
            "fp16",
            compute_capability=ComputeCapability(7, 5),
            is_integrated=False,
        )


ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    ours = {m.__file__ for n, m in sys.modules.items() if n.startswith("mmvision_export")}
    assert all(f.startswith(sys.argv[0]) for f in ours), ours
    heavy = {"torch", "triton", "onnx", "onnxruntime", "PIL"} & set(sys.modules)
    assert not heavy, heavy
"""


def test_a_pack_runs_alone_and_says_on_every_line_that_there_is_no_gpu(
    folder: Path,
    stand_in: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-I", "-c", ALONE, str(folder)]
    environment = {**os.environ, "FAKE_CUDA_DEVICES": "87"}
    result = subprocess.run(
        [*command, "--driver", str(stand_in), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) > 40
    assert all("stand-in" in line for line in lines)
    assert not any("pass" in line for line in lines)
    report = json.loads((tmp_path / "out" / "verify-gpu.json").read_text())
    assert report["is_stand_in"] is True
    assert {f["status"] for f in report["findings"]} == {"launched"}
    page = (tmp_path / "out" / "verify-gpu.md").read_text()
    assert page.count("stand-in driver, no GPU") == len(lines)

    missing = subprocess.run(
        [*command, "--driver", str(tmp_path / "no.so")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "Traceback" not in missing.stderr


def test_a_damaged_pack_is_refused(tmp_path: Path) -> None:
    with refused(ManifestError, tmp_path / "pack.json"):
        Pack.read(tmp_path)
    (tmp_path / "pack.json").write_text('{"format": 99}')
    with refused(ManifestError, tmp_path / "pack.json", 99, 1):
        Pack.read(tmp_path)


def test_the_command_without_a_gpu(mmvision: Command, exported: Path, tmp_path: Path) -> None:
    result = mmvision("verify-gpu", "--model", str(exported), "--output", str(tmp_path / "out"))
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert all("stand-in driver, no GPU" in line for line in lines)
    for part in list(SHARES)[1:]:
        assert f"stand-in driver, no GPU: not run: {part}, all; no GPU" in lines
    report = json.loads((tmp_path / "out" / "verify-gpu.json").read_text())
    assert report["is_complete"] is True
    assert report["machine"]["multiprocessors"] == 1
    assert set(report["machine"]) >= {"driver", "gpu", "memory_bytes", "packages", "tensorrt"}
    page = (tmp_path / "out" / "verify-gpu.md").read_text()
    assert [x[3:] for x in page.splitlines() if x.startswith("## ")] == list(SHARES)


def test_an_interrupt_keeps_what_was_found(
    mmvision: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pack: Pack, folder: Path, cuda: Any, findings: Findings, **_: Any) -> None:
        findings.not_run("kernels", "the one before Ctrl-C", "a test")
        raise KeyboardInterrupt

    monkeypatch.setattr("mmvision_export.verify_gpu.pack.write_pack", lambda *_, **__: 0)
    monkeypatch.setattr(Pack, "read", lambda _: None)
    monkeypatch.setattr("mmvision_export.verify_gpu.check.check_kernels", interrupted)
    result = mmvision("verify-gpu", "--model", str(exported), "--output", str(tmp_path / "out"))
    assert result.code == 130
    report = json.loads((tmp_path / "out" / "verify-gpu.json").read_text())
    assert [f["case"] for f in report["findings"]] == ["the one before Ctrl-C"]
    assert report["is_complete"] is False
    assert "not complete" in (tmp_path / "out" / "verify-gpu.md").read_text().splitlines()[0]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    mmvision: Command, exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = mmvision("verify-gpu", "--model", str(exported), "--output", str(tmp_path / "file"))
    assert result.code == 1
    assert result.out == ""
    assert any(str(tmp_path / "file") in line for line in result.errors)
