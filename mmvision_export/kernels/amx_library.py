"""Build `libmmvision_amx.so`: the operators for ONNX Runtime on x86-64 CPUs with AMX."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from mmvision_export.artifacts.library_record import (
    LibraryRecord,
    default_folder,
    library_record_path,
)
from mmvision_export.core.atomic import new_files
from mmvision_export.core.errors import OutputError, PluginError
from mmvision_export.core.files import file_record
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import record_built
from mmvision_export.kernels.cmake import cmake_build, toolchain
from mmvision_export.kernels.headers import onnxruntime_api_version, onnxruntime_headers
from mmvision_export.runtime.backends.onnxruntime_amx import AMX_LIBRARY
from mmvision_export.version import __version__

__all__ = ["build_amx_library"]

_MACHINE = "x86_64"


def build_amx_library(
    *,
    output: Path | None = None,
    onnxruntime_include: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, LibraryRecord]:
    """Build the library of AMX kernels, with a record beside it. The CPU need not have AMX itself.

    Args:
        output: Folder to put it in; `engines/plugins/x86_64` if None.
        onnxruntime_include: Folder of ONNX Runtime's C header; looked for if None. Where there is
            one, the library's table of its functions is compared with it, and the record says so.
        force: Replace a library that is there.
        progress: Told about each step.

    Returns:
        The library's path and its record.

    Raises:
        PluginError: This is no x86-64 machine, a tool is missing, the C++ does not compile, or the
            named folder has no such header.
        OutputError: The library exists, or cannot be written.
    """
    progress = progress or Progress()
    if platform.machine() != _MACHINE:
        raise PluginError(
            f"the AMX kernels are for {_MACHINE}, this machine is {platform.machine()}"
        )
    library = (output or default_folder(_MACHINE)) / AMX_LIBRARY
    # Without its record, it is what a killed build left.
    if library.exists() and library_record_path(library).exists() and not force:
        raise OutputError(
            f"{library} already exists", hint="choose another --output, or replace it with --force"
        )
    settings = toolchain(_MACHINE)
    versions = {"mmvision-export": __version__}
    headers = onnxruntime_headers(onnxruntime_include)
    if headers is not None:
        settings["ONNXRUNTIME_INCLUDE_DIR"] = headers.resolve()
        versions["onnxruntime header"] = onnxruntime_api_version(headers)
    progress.step("compiling the AMX kernels")
    with (
        new_files(library.parent, name=AMX_LIBRARY, last=library_record_path(library).name) as new,
        tempfile.TemporaryDirectory(prefix="mmvision-amx-") as temporary,
    ):
        build = Path(temporary)
        cmake_build(build, settings, project="amx")
        shutil.copyfile(build / AMX_LIBRARY, new / AMX_LIBRARY)
        record = LibraryRecord(
            library=file_record(new / AMX_LIBRARY),
            machine=_MACHINE,
            versions={**versions, "compiler": _compiler(build)},
        )
        record.write(new / library_record_path(library).name)
    if (obstacle := record_built(record.library.sha256, library)) is not None:
        progress.note(f"{library.name} loads only if you name it: {obstacle}")
    return library, record


def _compiler(build: Path) -> str:
    """The compiler that CMake found, by its own words."""
    found = re.search(
        r"^CMAKE_CXX_COMPILER:\w+=(.+)$",
        (build / "CMakeCache.txt").read_text(encoding="utf-8"),
        re.M,
    )
    if found is None:
        return "unknown"
    lines = subprocess.run(
        [found[1], "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return lines[0] if lines else "unknown"
