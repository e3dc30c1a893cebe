"""Make a pack: compile the kernels, compute the cases, and put in the few modules that run them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmvision_export.core.atomic import new_directory
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import PluginError
from mmvision_export.core.progress import Progress
from mmvision_export.kernels.compile import PORTABLE_PTX, compile_kernels
from mmvision_export.kernels.resources import ARCHITECTURES, CompiledKernel
from mmvision_export.verify_gpu.cases import sample_cases
from mmvision_export.verify_gpu.pack_file import KernelImage, Pack
from mmvision_export.version import __version__

__all__ = ["MAX_PACK_BYTES", "write_pack"]

MAX_PACK_BYTES = 60_000_000
"""A pack is carried, so it stays small."""

# What runs a pack; a test holds that it is enough.
_MODULES = (
    "__init__",
    "version",
    "artifacts/__init__",
    "artifacts/gpu",
    "core/__init__",
    "core/compute_capability",
    "core/errors",
    "runtime/__init__",
    "runtime/backends/cuda",
    "runtime/backends/cuda_driver",
    "runtime/backends/cuda_versions",
    "verify_gpu/__init__",
    "verify_gpu/cases",
    "verify_gpu/check",
    "verify_gpu/findings",
    "verify_gpu/launch",
    "verify_gpu/machine",
    "verify_gpu/pack_file",
    "verify_gpu/run",
)
_MAIN = """\
import sys
from pathlib import Path

from mmvision_export.verify_gpu.run import main

sys.exit(main([str(Path(__file__).parent), *sys.argv[1:]]))
"""


def write_pack(
    output: Path,
    *,
    compute_capabilities: Sequence[ComputeCapability] = (),
    head_dim: int = 80,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a folder that `python3 FOLDER` runs on a GPU machine with NumPy.

    Args:
        output: The folder.
        compute_capabilities: GPUs to have binaries for; all of `ARCHITECTURES` if empty. PTX is always in.
        head_dim: Of the attention kernel.
        force: Replace a pack that is there.
        progress: Told about each step.

    Returns:
        Its bytes.

    Raises:
        PluginError: A kernel cannot be compiled, or the pack is too large to be carried.
        OutputError: The folder exists, or cannot be written.
    """
    progress = progress or Progress()
    targets = sorted({*(compute_capabilities or ARCHITECTURES), PORTABLE_PTX})
    with new_directory(output, marker="pack.json", force=force) as new:
        progress.step("compiling kernels", 4 * len(targets))
        kernels: list[KernelImage] = []
        for compiled in compile_kernels(targets, [head_dim]):
            kernels += _written(compiled, new)
            progress.advance()
        progress.step("computing cases")
        Pack(head_dim, __version__, kernels, list(sample_cases(head_dim))).write(new)
        _copy_modules(new, _MODULES)
        (new / "__main__.py").write_text(_MAIN, encoding="utf-8")
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if size > MAX_PACK_BYTES:
            raise PluginError(
                f"the pack has {size} bytes, it must have at most {MAX_PACK_BYTES}",
                hint="name fewer GPUs with --sm",
            )
    return size


def _written(kernel: CompiledKernel, folder: Path) -> Iterable[KernelImage]:
    integrated = ARCHITECTURES[kernel.compute_capability].is_integrated
    reach = "exact" if integrated or kernel.target.endswith("a") else "same_major"
    images = [("cubin", kernel.cubin, reach)]
    if kernel.compute_capability == PORTABLE_PTX:
        images.append(("ptx", kernel.ptx.encode(), "later"))
    sm = kernel.compute_capability.sm
    for kind, image, reaches in images:
        file = f"{kernel.op}-{sm}-{kernel.dtype}.{kind}"
        (folder / file).write_bytes(image)
        yield KernelImage(
            kernel.op,
            sm,
            reaches,
            kernel.dtype,
            kernel.head_dim,
            kernel.function,
            kernel.rows,
            kernel.num_warps,
            kernel.shared_bytes,
            file,
        )


def _copy_modules(folder: Path, modules: Iterable[str]) -> None:
    package = Path(__file__).parents[1]
    for module in modules:
        target = folder / package.name / f"{module}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / f"{module}.py", target)
    # Of the backends only these three go along, and not the registry that names them all.
    (folder / package.name / "runtime" / "backends" / "__init__.py").touch()
