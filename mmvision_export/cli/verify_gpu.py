"""The `mmvision verify-gpu` command."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages
from mmvision_export.cli.options import ModelOption, Quiet, Verbose, the_model
from mmvision_export.core.errors import OutputError
from mmvision_export.core.progress import Progress

if TYPE_CHECKING:
    from mmvision_export.core.compute_capability import ComputeCapability
    from mmvision_export.runtime.backends.cuda import Cuda
    from mmvision_export.verify_gpu.budget import Budget
    from mmvision_export.verify_gpu.findings import Findings

__all__ = ["verify_gpu"]

_STAND_IN_SM = 87


class _Steps(Progress):
    """A line for each step: findings are printed in between, which a bar would be in the way of."""

    def step(self, description: str, total: float | None = None) -> None:
        """See `Progress.step`."""
        messages.print(f"{description} ...", markup=False)

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        messages.print(f"note: {message}", markup=False)


@examples("mmvision verify-gpu --model engines/MiniMax-M3 --output report")
def verify_gpu(
    model: ModelOption = None,
    device: Annotated[int, typer.Option(metavar="N", help="CUDA device.", min=0)] = 0,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for verify-gpu.json and verify-gpu.md.")
    ] = Path("verify-gpu"),
    budget_minutes: Annotated[
        float,
        typer.Option(
            metavar="MINUTES",
            help="Time for all parts. A part begins no check after its share is over.",
        ),
    ] = 45,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check on a GPU everything that has never run on one.

    The command writes one JSON file and one page to send back. It launches the attention and rotary
    kernels by the CUDA driver alone, and compares them with float64. It builds an engine for each
    installed TensorRT and each way of attention, and compares it with ONNX Runtime on the CPU. It
    captures every bucket, looks for leaks, measures latency, clocks and power, gives arrays on the
    device, and checks refusals. A failed check is a finding, and the next check goes on. Ctrl-C keeps
    the findings so far.

    Without a GPU the kernels run against a stand-in for the driver, which checks launches and
    computes nothing. The other parts do not run then. Every line says so.

    For a machine with NumPy alone: run python -m mmvision_export.verify_gpu pack --output DIR here,
    copy DIR there, and run python3 DIR.
    """
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.verify_gpu.budget import Budget
    from mmvision_export.verify_gpu.findings import Findings
    from mmvision_export.verify_gpu.machine import is_stand_in, machine_facts

    directory = the_model(model)
    head_dim = Manifest.read(directory).config.head_dim
    budget = Budget(budget_minutes)
    tell = lambda line: console.print(line, markup=False, soft_wrap=True)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="mmvision-verify-gpu-") as temporary:
        cuda = _gpu_or_stand_in(device, Path(temporary))
        findings = Findings(machine_facts(cuda), is_stand_in(cuda), tell)
        files = _written(findings, output)  # that it can be is known before the long work
        try:
            _run_parts(directory, head_dim, cuda, findings, budget, Path(temporary), output)
            findings.is_complete = True
        finally:
            files = _written(findings, output)
            console.print(
                f"{findings.summary}: {', '.join(map(str, files))}", markup=False, soft_wrap=True
            )
    if findings.failed:
        raise typer.Exit(1)


def _run_parts(
    directory: Path,
    head_dim: int,
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    temporary: Path,
    output: Path,
) -> None:
    from mmvision_export.verify_gpu.check import check_kernels
    from mmvision_export.verify_gpu.pack import write_pack
    from mmvision_export.verify_gpu.pack_file import Pack
    from mmvision_export.verify_gpu.whole import check_model, tensorrt_versions

    findings.machine |= {"model": str(directory), **tensorrt_versions()}
    progress = _Steps()
    with findings.failure_is_a_finding("kernels", "all"):
        folder = temporary / "pack"
        compiled_for = _compiled_for(cuda)
        write_pack(folder, compute_capabilities=compiled_for, head_dim=head_dim, progress=progress)
        is_spent = functools.partial(budget.is_spent, "kernels")
        check_kernels(Pack.read(folder), folder, cuda, findings, is_spent=is_spent)
    check_model(
        directory, cuda, findings, budget, folder=temporary, output=output, progress=progress
    )


def _written(findings: Findings, output: Path) -> list[Path]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return findings.write(output)
    except OSError as error:
        raise OutputError(f"{error.filename or output}: {error.strerror}") from error


def _compiled_for(cuda: Cuda) -> list[ComputeCapability]:
    from mmvision_export.kernels.resources import ARCHITECTURES

    here = cuda.compute_capability()
    return [here] if here in ARCHITECTURES else []


def _gpu_or_stand_in(device: int, folder: Path) -> Cuda:
    from mmvision_export.kernels.stand_in import build_stand_in
    from mmvision_export.runtime.backends.cuda import Cuda
    from mmvision_export.runtime.backends.cuda_driver import CudaDriver, NoGpuError

    with contextlib.suppress(NoGpuError):
        return Cuda(device)
    messages.print("there is no GPU: launches go to a stand-in for the driver", markup=False)
    library = ctypes.CDLL(str(build_stand_in(folder)))
    library.fakeAddDevice(_STAND_IN_SM, 1)
    return Cuda(0, CudaDriver(library))
