"""Every case of a pack on one GPU: plain, under a captured graph, and a control that must be refused."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.cuda_driver import cuda_version_text
from mmvision_export.verify_gpu.cases import Case, float_from_bits, relative_l2
from mmvision_export.verify_gpu.launch import Launcher, opened, wrong_inputs
from mmvision_export.verify_gpu.pack_file import Pack, kernel_for

__all__ = ["Finding", "Findings", "check_kernels", "is_stand_in"]

Status = Literal["pass", "FAIL", "launched"]
How = Literal["plain", "graph", "control"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One way of running one case.

    Attributes:
        op: The kernel's.
        dtype: fp16 or bf16.
        case: Its name.
        how: `plain`, under a captured `graph`, or a `control`: wrong inputs, which must be refused.
        status: `pass`, `FAIL`, or `launched` where nothing computes.
        distance: Largest relative L2 distance of an output to float64, over what is allowed: 1 is the limit.
        times_us: Microseconds of a launch by CUDA events: median, least, most.
        error: Why it could not run.
    """

    op: str
    dtype: str
    case: str
    how: How
    status: Status
    distance: float | None = None
    times_us: dict[str, float] | None = None
    error: str | None = None

    @property
    def line(self) -> str:
        """For people."""
        parts = [f"{self.status}: {self.op}, {self.dtype}, {self.case}, {self.how}"]
        if self.distance is not None:
            parts.append(f"{self.distance:.2f} of the allowed distance to float64")
        if self.times_us is not None:
            parts.append(f"{self.times_us['median']:.1f} us")
        if self.error is not None:
            parts.append(self.error)
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a GPU did with a pack.

    Attributes:
        machine: Device, driver and versions.
        is_stand_in: The driver is the stand-in: launches were checked, nothing was computed.
        findings: In order.
    """

    machine: dict[str, Any]
    is_stand_in: bool
    findings: list[Finding]

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(finding.status == "FAIL" for finding in self.findings)

    @property
    def summary(self) -> str:
        """One line."""
        count = len(self.findings)
        if self.is_stand_in:
            return (
                f"stand-in driver, no GPU: {count} launches were checked, nothing was computed; "
                f"{self.failed} failed"
            )
        return f"{self.failed} of {count} failed"

    def line_of(self, finding: Finding) -> str:
        """A finding's line, which says where it is from."""
        return f"stand-in driver, no GPU: {finding.line}" if self.is_stand_in else finding.line

    def write(self, folder: Path) -> list[Path]:
        """Write `verify-gpu.json` and `verify-gpu.md`, and give their paths."""
        content = dataclasses.asdict(self)
        page = [f"# verify-gpu: {self.summary}", ""]
        page += [f"* {name}: {value}" for name, value in self.machine.items()]
        page += ["", *(f"* {self.line_of(finding)}" for finding in self.findings), ""]
        texts = {"verify-gpu.json": json.dumps(content, indent=1), "verify-gpu.md": "\n".join(page)}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]


def is_stand_in(cuda: Cuda) -> bool:
    """Whether the driver is the one of `plugins/tests`, which computes nothing."""
    return cuda.driver.has("fakeReport")


def check_kernels(
    pack: Pack,
    folder: Path,
    cuda: Cuda,
    *,
    computes: bool | None = None,
    tell: Callable[[str], None] = print,
) -> Findings:
    """Run every case.

    Args:
        pack: Read from `folder`.
        folder: Where the images are.
        cuda: The GPU.
        computes: Whether results are to be compared; not with the stand-in if None.
        tell: Given each finding's line as it is made.

    Raises:
        InputError: The pack has no kernel for this GPU.
        BackendError: The device cannot be used at all.
    """
    cuda.use()
    stand_in = is_stand_in(cuda)
    computes = not stand_in if computes is None else computes
    machine = {
        "gpu": cuda.name(),
        "compute_capability": str(cuda.compute_capability()),
        "integrated": cuda.is_integrated(),
        "memory_bytes": cuda.memory_bytes(),
        "free_bytes_before": cuda.free_bytes(),
        "driver_cuda": cuda_version_text(cuda.driver.version),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "pack": pack.version,
    }
    result = Findings(machine, stand_in, [])
    for case in pack.cases:
        for finding in _findings_of(case, pack, folder, cuda, computes=computes):
            result.findings.append(finding)
            tell(result.line_of(finding))
    machine["free_bytes_after"] = cuda.free_bytes()
    cuda.close()
    return result


def _findings_of(
    case: Case, pack: Pack, folder: Path, cuda: Cuda, *, computes: bool
) -> list[Finding]:
    kernel = kernel_for(
        pack.kernels,
        case.op,
        case.dtype,
        compute_capability=cuda.compute_capability(),
        is_integrated=cuda.is_integrated(),
    )
    image = (folder / kernel.file).read_bytes()
    ways: list[tuple[How, Case]] = [("plain", case), ("graph", case)]
    if (wrong := wrong_inputs(case)) is not None:
        ways.append(("control", dataclasses.replace(case, inputs=wrong)))
    findings = []
    for how, given in ways:
        of = {"op": case.op, "dtype": case.dtype, "case": case.name, "how": how}
        try:
            with opened(cuda, kernel, image, given) as launcher:
                findings.append(Finding(**of, **_ran(launcher, case, how, computes=computes)))  # type: ignore[arg-type]
        except BackendError as error:
            findings.append(Finding(**of, status="FAIL", error=str(error)))  # type: ignore[arg-type]
    return findings


def _ran(launcher: Launcher, case: Case, how: How, *, computes: bool) -> dict[str, Any]:
    graph = launcher.captured() if how == "graph" else None
    outputs = launcher.results(graph=graph)
    if not computes:
        return {"status": "launched"}
    distances = [
        relative_l2(float_from_bits(output, case.dtype), expected) / allowed
        for output, expected, allowed in zip(outputs, case.expected, case.allowed, strict=True)
    ]
    is_close = max(distances) <= 1
    is_right = is_close if how != "control" else not is_close
    times = None if how == "control" else launcher.times_us(graph=graph)
    status: Status = "pass" if is_right else "FAIL"
    return {"status": status, "distance": max(distances), "times_us": times}
