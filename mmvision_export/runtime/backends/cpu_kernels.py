"""The library of CPU kernels as ONNX Runtime's CPU backend finds and loads it.

`mmvision build-plugins --cpu` makes it. It holds the operators of the CPU flavour of a graph for processors with AMX.
Without it, or on another processor, ONNX Runtime runs the functions that the graph defines these operators by.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from mmvision_export.artifacts.library_record import LIBRARIES, LibraryRecord
from mmvision_export.core.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CPU_LIBRARY", "find_cpu_kernels", "has_amx", "register_cpu_kernels"]

CPU_LIBRARY = "libmmvision_cpu.so"
_NO_AMX = "no: this CPU has no AMX"


def find_cpu_kernels(directory: Path) -> tuple[Path | None, str]:
    """The library for a model directory, in `plugins/<CPU>/` of the directory itself or of the folder that it is in.

    Returns:
        The library, verified and for this CPU, or None; and in words what was found.

    Raises:
        ManifestError: There is one, but it is not the file of its record.
        BackendError: It cannot be loaded.
    """
    machine = platform.machine()
    for folder in (directory, directory.resolve().parent):
        library = folder / LIBRARIES / machine / CPU_LIBRARY
        if library.is_file():
            LibraryRecord.read(library)
            return (library, str(library)) if _runs_here(library) else (None, _NO_AMX)
    return None, f"no: none built; {LibraryRecord.BUILD}" if has_amx() else _NO_AMX


def register_cpu_kernels(options: onnxruntime.SessionOptions, library: Path) -> None:
    """Let a session that is opened with these options use a library's kernels.

    Raises:
        BackendError: ONNX Runtime refuses the library.
    """
    try:
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BackendError(
            f"ONNX Runtime cannot load {library}: {error}", hint=LibraryRecord.BUILD
        ) from error


def _runs_here(library: Path) -> bool:
    try:
        return bool(ctypes.CDLL(str(library.resolve())).mmvision_cpu_supported())
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"{library} cannot be loaded: {error}", hint=f"build it again: {LibraryRecord.BUILD}"
        ) from error


def has_amx() -> bool:
    """Whether the system says of this CPU that it has AMX for bfloat16."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
