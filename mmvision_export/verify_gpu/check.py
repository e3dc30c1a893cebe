"""Every case of a pack on one GPU: plain, under a captured graph, and a control that must be refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.verify_gpu.cases import Case, float_from_bits, relative_l2
from mmvision_export.verify_gpu.findings import Finding, Findings, Status
from mmvision_export.verify_gpu.launch import Launcher, opened, wrong_inputs
from mmvision_export.verify_gpu.pack_file import Pack, kernel_for

__all__ = ["KernelFinding", "check_kernels"]

How = Literal["plain", "graph", "control"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFinding(Finding):
    """One way of running one case.

    Its numbers are the largest relative L2 distance of an output to float64 over what is allowed, of
    which 1 is the limit, and microseconds of a launch by CUDA events.

    Attributes:
        op: The kernel's.
        dtype: fp16 or bf16.
        how: `plain`, under a captured `graph`, or a `control`: wrong inputs, which must be refused.
    """

    part: str = "kernels"
    op: str
    dtype: str
    how: How

    @property
    def subject(self) -> str:
        """See `Finding.subject`."""
        return f"{self.op}, {self.dtype}, {self.case}, {self.how}"


def check_kernels(
    pack: Pack,
    folder: Path,
    cuda: Cuda,
    findings: Findings,
    *,
    computes: bool | None = None,
    is_spent: Callable[[], bool] = lambda: False,
) -> None:
    """Run every case.

    Args:
        pack: Read from `folder`.
        folder: Where the images are.
        cuda: The GPU.
        findings: Where to put what is found.
        computes: Whether results are to be compared; not with the stand-in if None.
        is_spent: Whether there is no more time.

    Raises:
        InputError: The pack has no kernel for this GPU.
        BackendError: The device cannot be used at all.
    """
    cuda.use()
    computes = not findings.is_stand_in if computes is None else computes
    findings.machine["pack"] = pack.version
    for done, case in enumerate(pack.cases):
        if is_spent():
            findings.not_run("kernels", f"{len(pack.cases) - done} cases", "no time is left")
            break
        for finding in _findings_of(case, pack, folder, cuda, computes=computes):
            findings.add(finding)
    findings.machine["free_bytes_after_kernels"] = cuda.free_bytes()
    cuda.close()


def _findings_of(
    case: Case, pack: Pack, folder: Path, cuda: Cuda, *, computes: bool
) -> list[KernelFinding]:
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
        try:
            with opened(cuda, kernel, image, given) as launcher:
                ran = _ran(launcher, case, how, computes=computes)
        except BackendError as error:
            ran = {"status": "FAIL", "detail": error.message}
        findings.append(KernelFinding(op=case.op, dtype=case.dtype, case=case.name, how=how, **ran))
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
    numbers = {"of_allowed_distance": max(distances)}
    if how != "control":
        times = launcher.times_us(graph=graph)
        numbers |= {f"{name}_us": microseconds for name, microseconds in times.items()}
    status: Status = "pass" if is_right else "FAIL"
    return {"status": status, "numbers": numbers}
