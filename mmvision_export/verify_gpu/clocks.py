"""Clocks, power and temperature of a GPU now: by NVML, or by tegrastats on a Jetson.

References:
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    Jetson Linux Developer Guide 36.4, "Tegrastats Utility"
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends.cuda import Cuda

__all__ = ["NOT_AVAILABLE", "describe_clocks", "words_from_tegrastats"]

NOT_AVAILABLE = "clocks and power: not available"

_BUS, _DEVICE, _DOMAIN = 33, 34, 50  # CU_DEVICE_ATTRIBUTE_PCI_...
_LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
_SM, _MEMORY = 1, 2  # NVML_CLOCK_...
_ON_THE_DIE = 0  # NVML_TEMPERATURE_GPU


def describe_clocks(cuda: Cuda) -> str:
    """`SM 1410 MHz, memory 1215 MHz, 61200 mW, 43 C (NVML)`, or that nothing here says."""
    return _by_nvml(cuda) or _by_tegrastats() or NOT_AVAILABLE


def _by_nvml(cuda: Cuda) -> str | None:
    library = _loaded()
    if library is None or library.nvmlInit_v2():
        return None
    try:
        device = ctypes.c_void_p()
        # NVML counts devices otherwise than CUDA, and sees those CUDA_VISIBLE_DEVICES hides.
        bus = _bus_id(cuda)
        if bus is None or library.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(device)):
            return None
        clock = library.nvmlDeviceGetClockInfo
        readings: dict[str, Callable[[Any], int]] = {
            "SM {} MHz": functools.partial(clock, device, ctypes.c_int(_SM)),
            "memory {} MHz": functools.partial(clock, device, ctypes.c_int(_MEMORY)),
            "{} mW": functools.partial(library.nvmlDeviceGetPowerUsage, device),
            "{} C": functools.partial(
                library.nvmlDeviceGetTemperature, device, ctypes.c_int(_ON_THE_DIE)
            ),
        }
        value = ctypes.c_uint()
        found = [
            words.format(value.value)
            for words, read in readings.items()
            if read(ctypes.byref(value)) == 0  # what a device does not say is left out
        ]
        return f"{', '.join(found)} (NVML)" if found else None
    finally:
        library.nvmlShutdown()


def _loaded() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _bus_id(cuda: Cuda) -> bytes | None:
    try:
        domain, bus, device = (cuda.attribute(number) for number in (_DOMAIN, _BUS, _DEVICE))
    except BackendError:
        return None
    return f"{domain:08x}:{bus:02x}:{device:02x}.0".encode()


def _by_tegrastats() -> str | None:
    program = shutil.which("tegrastats")
    if program is None:
        return None
    with subprocess.Popen(
        [program, "--interval", "200"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            process.kill()
    return words_from_tegrastats(line)


def words_from_tegrastats(line: str) -> str | None:
    """The GPU's load and clock, and each rail's power, of a line that tegrastats prints."""
    found = re.findall(r"GR3D_FREQ \S+|\b(?:VDD|VIN)\w* \d+mW|\bgpu@\S+C", line)
    return f"{', '.join(found)} (tegrastats)" if found else None
