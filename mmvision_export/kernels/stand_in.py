"""The stand-in for the CUDA driver, compiled: tests and a machine without a GPU run against it.

Its sources are in `plugins/tests/`. It has the driver's symbols and rules, computes nothing, and does
what is in a stream only when somebody waits for it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from mmvision_export.core.errors import PluginError
from mmvision_export.kernels.compile import plugins_root
from mmvision_export.kernels.headers import cuda_headers

__all__ = ["STAND_IN", "build_stand_in"]

STAND_IN = "libcuda.so.1"
"""Its file name, which is the driver's."""

_SOURCES = ("cubin", "fake_cuda", "fake_memory", "fake_modules", "fake_streams")


def build_stand_in(folder: Path) -> Path:
    """Compile the stand-in.

    Args:
        folder: An existing folder to put it in.

    Raises:
        PluginError: There is no C++ compiler or no cuda.h, or it does not compile.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise PluginError("g++ is not installed", hint="apt-get install g++")
    root = plugins_root()
    library = folder / STAND_IN
    sources = [str(root / "tests" / f"{name}.cpp") for name in _SOURCES]
    command = [compiler, "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{root}"]
    # No -soname: a copy that is loaded by its path must not answer who looks for libcuda.so.1 later.
    command += [
        f"-isystem{cuda_headers()}",
        *sources,
        "-o",
        str(library),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
        raise PluginError(f"the stand-in for the driver does not compile: {first}")
    return library
