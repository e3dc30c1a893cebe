"""The computer that a command runs on, for `mmvision doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from mmvision_export.core.processor import processor_flags, processor_name

__all__ = ["describe_machine"]

_MEMORY_FACTS = Path("/proc/meminfo")

# Flag of /proc/cpuinfo -> its name, for what multiplies matrices faster than AVX2.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI (int8)",
    "avx_vnni": "AVX-VNNI (int8)",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimddp": "dot product (int8)",
    "i8mm": "I8MM (int8)",
    "bf16": "BF16",
    "sve": "SVE",
}


def describe_machine() -> dict[str, str]:
    """Facts by name, each in words. A fact that the system does not tell is left out."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": _cores(),
        "memory": _memory(),
        "fast products": _features(),
        "compiler": _version("g++", "--version"),
        "CMake": _version("cmake", "--version"),
    }
    return {name: value for name, value in facts.items() if value}


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    everything = os.cpu_count()
    return f"{usable}" if usable == everything else f"{usable} of {everything}"


def _memory() -> str:
    try:
        lines = _MEMORY_FACTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    sizes = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
    }
    return f"{sizes['MemTotal'] / 1e9:.1f} GB, {sizes['MemAvailable'] / 1e9:.1f} GB available"


def _features() -> str:
    flags = processor_flags()
    return ", ".join(name for flag, name in _FEATURES.items() if flag in flags)


def _version(program: str, option: str) -> str:
    """The first line of what a program says of itself, or that it is not here."""
    if shutil.which(program) is None:
        return f"no {program}: build-plugins needs it"
    done = subprocess.run(
        [program, option], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.splitlines()[0] if done.stdout else ""
