"""Build `libmmvision_plugins.so`: compile the kernels, embed them, compile the C++ around them with CMake."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.artifacts.library_record import MACHINES, library_record_path
from mmvision_export.artifacts.plugin_library import LIBRARY, PluginLibraryRecord, default_library
from mmvision_export.core.atomic import new_files
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import OutputError, PluginError
from mmvision_export.core.files import file_record
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import record_built
from mmvision_export.kernels.cmake import cmake_build, toolchain
from mmvision_export.kernels.compile import DTYPES, HEAD_DIMS, PORTABLE_PTX, compile_kernels
from mmvision_export.kernels.embed import write_embedded_kernels
from mmvision_export.kernels.headers import cuda_headers, tensorrt_header_version, tensorrt_headers
from mmvision_export.kernels.resources import ARCHITECTURES, CompiledKernel, resource_table
from mmvision_export.version import __version__

__all__ = ["build_plugins"]


def build_plugins(
    *,
    compute_capabilities: Sequence[ComputeCapability] = (),
    head_dims: Sequence[int] = (),
    machine: str | None = None,
    output: Path | None = None,
    tensorrt_include: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, PluginLibraryRecord]:
    """Build the plugin library, with a record and the resource table beside it.

    Args:
        compute_capabilities: GPUs to compile for; all of `ARCHITECTURES` if empty. PTX for later
            GPUs is always in.
        head_dims: Head sizes of the attention kernel; all of `HEAD_DIMS` if empty.
        machine: CPU it will run on, of `MACHINES`; this machine's if None, else cross-compiled.
        output: Folder to put it in; `engines/plugins/<machine>` if None.
        tensorrt_include: Folder of TensorRT's headers; looked for if None.
        force: Replace a library that is there.
        progress: Told about each step.

    Returns:
        The library's path and its record.

    Raises:
        PluginError: A kernel or the C++ does not compile, or headers or tools are missing.
        OutputError: The library exists, or cannot be written.
    """
    progress = progress or Progress()
    known = [capability.sm for capability in ARCHITECTURES]
    sms = _checked("--sm", [capability.sm for capability in compute_capabilities], known)
    head_dims = _checked("--head-dim", head_dims, HEAD_DIMS)
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise PluginError(f"plugins can be built for {' and '.join(MACHINES)}, not for {machine}")
    library = default_library(machine) if output is None else output / LIBRARY
    # Without its record, it is what a killed build left.
    if library.exists() and library_record_path(library).exists() and not force:
        raise OutputError(
            f"{library} already exists", hint="choose another --output, or replace it with --force"
        )
    # Everything that can be missing is looked for before minutes are spent on kernels.
    include = tensorrt_headers(tensorrt_include)
    version = tensorrt_header_version(include)
    cuda = cuda_headers()
    compiler = toolchain(machine)

    targets = sorted({*map(ComputeCapability.from_sm, sms), PORTABLE_PTX})
    progress.step(
        f"compiling kernels for {', '.join(str(target.sm) for target in targets)}",
        len(targets) * 2 * (len(head_dims) + 1),
    )
    kernels: list[CompiledKernel] = []
    for kernel in compile_kernels(targets, head_dims):
        kernels.append(kernel)
        progress.advance()
    with (
        new_files(library.parent, name=LIBRARY, last=library_record_path(library).name) as new,
        tempfile.TemporaryDirectory(prefix="mmvision-plugins-") as temporary,
    ):
        sources, build = Path(temporary) / "kernels", Path(temporary) / "build"
        sources.mkdir()
        write_embedded_kernels(kernels, sources)
        progress.step("compiling the library")
        folders = {
            "MMVISION_KERNELS": sources,
            "TENSORRT_INCLUDE_DIR": include,
            "CUDA_INCLUDE_DIR": cuda,
        }
        cmake_build(build, {**folders, **compiler})
        shutil.copyfile(build / LIBRARY, new / LIBRARY)
        record = PluginLibraryRecord(
            library=file_record(new / LIBRARY),
            machine=machine,
            sms=[target.sm for target in targets],
            head_dims=list(head_dims),
            dtypes=list(DTYPES),
            versions={
                "mmvision-export": __version__,
                "triton": importlib.metadata.version("triton"),
                "tensorrt headers": version,
            },
        )
        record.write(new / library_record_path(library).name)
        (new / "kernels.md").write_text(resource_table(kernels) + "\n", encoding="utf-8")
    if (obstacle := record_built(record.library.sha256, library)) is not None:
        progress.note(f"{library.name} loads only if you name it: {obstacle}")
    return library, record


def _checked(option: str, given: Sequence[int], known: Sequence[int]) -> list[int]:
    for value in given:
        if value not in known:
            raise PluginError(
                f"{option} {value}: there are kernels for {', '.join(map(str, known))}"
            )
    return sorted(set(given)) or list(known)
