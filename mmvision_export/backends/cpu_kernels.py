"""The library of CPU kernels as ONNX Runtime's CPU backend finds and loads it.

`mmvision build-plugins --cpu` makes it. It holds the operators of the CPU flavour of a graph for processors with AMX.
Without it, or on another processor, ONNX Runtime runs the functions that the graph defines these operators by.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from mmvision_export.errors import BackendError
from mmvision_export.library_record import LIBRARIES, LibraryRecord

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CPU_LIBRARY", "CpuKernels", "find_cpu_kernels", "has_amx"]

CPU_LIBRARY = "libmmvision_cpu.so"


@dataclasses.dataclass(frozen=True)
class CpuKernels:
    """A verified library that runs on this CPU.

    Attributes:
        library: The file.
        record: What it was made with.
    """

    library: Path
    record: LibraryRecord

    def register(self, options: onnxruntime.SessionOptions) -> None:
        """Let a session that is opened with these options use the kernels.

        Raises:
            BackendError: ONNX Runtime refuses the library.
        """
        try:
            options.register_custom_ops_library(str(self.library.resolve()))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime cannot load {self.library}: {error}", hint=LibraryRecord.BUILD) from error


def find_cpu_kernels(directory: Path) -> CpuKernels | str:
    """The library for a model directory, in `plugins/<CPU>/` of the directory itself or of the folder that it is in.

    Returns:
        The library, or in a few words why there is none.

    Raises:
        ManifestError: There is one, but it is not the file of its record.
        BackendError: It cannot be loaded.
    """
    machine = platform.machine()
    for folder in (directory, directory.resolve().parent):
        library = folder / LIBRARIES / machine / CPU_LIBRARY
        if library.is_file():
            record = LibraryRecord.read(library)
            return CpuKernels(library, record) if _runs_here(library) else "this CPU has no AMX"
    return f"none built; {LibraryRecord.BUILD}" if has_amx() else "this CPU has no AMX"


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
