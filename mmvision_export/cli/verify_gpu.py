"""The `mmvision verify-gpu` command."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.options import ModelOption, Verbose, the_model

if TYPE_CHECKING:
    from mmvision_export.core.compute_capability import ComputeCapability
    from mmvision_export.runtime.backends.cuda import Cuda

__all__ = ["verify_gpu"]

_STAND_IN_SM = 87


def verify_gpu(
    model: ModelOption = None,
    device: Annotated[int, typer.Option(help="CUDA device.", min=0)] = 0,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for verify-gpu.json and verify-gpu.md.")
    ] = Path("verify-gpu"),
    verbose: Verbose = False,
) -> None:
    """Run on a GPU what has never run on one, and write one JSON and one page to send back.

    So far its first part: the attention and rotary kernels for the model's head size, launched by the CUDA driver
    alone, plain and under a captured graph, against float64 results, with times by CUDA events. Without a GPU it runs
    against a stand-in for the driver, which checks launches and computes nothing, and says so on every line.
    For a machine that has NumPy alone: python -m mmvision_export.verify_gpu pack --output DIR, carry, python3 DIR.
    """
    from mmvision_export.artifacts.manifest import Manifest
    from mmvision_export.verify_gpu.check import check_kernels
    from mmvision_export.verify_gpu.pack import write_pack
    from mmvision_export.verify_gpu.pack_file import Pack

    head_dim = Manifest.read(the_model(model)).config.head_dim
    with tempfile.TemporaryDirectory(prefix="mmvision-verify-gpu-") as temporary:
        cuda = _gpu_or_stand_in(device, Path(temporary))
        folder = Path(temporary) / "pack"
        with progress_display() as progress:
            write_pack(
                folder,
                compute_capabilities=_compiled_for(cuda),
                head_dim=head_dim,
                progress=progress,
            )
        tell = lambda line: console.print(line, markup=False, soft_wrap=True)  # noqa: E731
        findings = check_kernels(Pack.read(folder), folder, cuda, tell=tell)
    output.mkdir(parents=True, exist_ok=True)
    files = findings.write(output)
    console.print(f"{findings.summary}: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    if findings.failed:
        raise typer.Exit(1)


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
