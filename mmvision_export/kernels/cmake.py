"""Compile the C++ projects of `plugins/` with CMake, for this machine or for another."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

from mmvision_export.core.errors import PluginError
from mmvision_export.kernels.compile import plugins_root

__all__ = ["cmake_build", "toolchain"]


def toolchain(machine: str) -> dict[str, str | Path]:
    """CMake's settings to compile for a CPU.

    Raises:
        PluginError: CMake or the compiler is not installed.
    """
    here = platform.machine()
    compiler = "g++" if machine == here else f"{machine}-linux-gnu-g++"
    packages = {"cmake": "cmake", "g++": "g++"}
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            package = packages.get(tool, f"g++-{machine}-linux-gnu")
            raise PluginError(f"{tool} is not installed", hint=f"apt-get install {package}")
    if machine == here:
        return {}
    return {"CMAKE_TOOLCHAIN_FILE": plugins_root() / "cmake" / f"{machine}-linux-gnu.cmake"}


def cmake_build(build: Path, settings: dict[str, str | Path], *, project: str = ".") -> None:
    """Configure and build a CMake project of `plugins/`.

    Args:
        build: Build folder, made if missing.
        settings: Cache variables.
        project: Its folder in `plugins/`.

    Raises:
        PluginError: With the compiler's first messages.
    """
    variables = [f"-D{name}={value}" for name, value in settings.items()]
    _run("cmake", "-S", str(plugins_root() / project), "-B", str(build), *variables)
    _run("cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1))


def _run(*command: str) -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        log, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # cmake's compilers too
        process.wait()
        raise
    if process.returncode:
        raise PluginError(f"{command[0]} {command[1]} failed: {_reason_in(log)}")


def _reason_in(log: str) -> str:
    """Three lines from the first error on: a compiler's is one line, CMake's has its text below."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return " ".join(lines[number : number + 3])
    return " ".join(lines[-3:])
