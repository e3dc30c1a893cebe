"""Where the C++ headers are that libraries are compiled with: TensorRT's, CUDA's, ONNX Runtime's."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from mmvision_export.core.errors import PluginError
from mmvision_export.core.install import install_command

__all__ = [
    "cuda_headers",
    "onnxruntime_api_version",
    "onnxruntime_headers",
    "tensorrt_header_version",
    "tensorrt_headers",
]

_HEADER = "NvInferRuntime.h"
_ONNXRUNTIME_HEADER = "onnxruntime_c_api.h"

# Where `make install` of ONNX Runtime and distributions' packages put it.
_ONNXRUNTIME_SYSTEM = (
    "/usr/local/include/onnxruntime",
    "/usr/local/include",
    "/usr/include/onnxruntime",
    "/usr/include",
)

# Debian packages and JetPack, a tar file unpacked where its guide says, and the container images.
_SYSTEM = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
)


def tensorrt_headers(given: Path | None = None) -> Path:
    """The folder with TensorRT's headers.

    Args:
        given: Look here and nowhere else. By default `TENSORRT_INCLUDE_DIR`, then where TensorRT and JetPack install
            them, then those inside the Python package kernel-lens.

    Raises:
        PluginError: They are not found; names the places.
    """
    named = given if given is not None else os.environ.get("TENSORRT_INCLUDE_DIR")
    if named:
        folder = Path(named)
        if not (folder / _HEADER).is_file():
            raise PluginError(f"{folder} has no {_HEADER}: it is not TensorRT's include folder")
        return folder
    places = [Path(place) for place in _SYSTEM]
    package = importlib.util.find_spec("kernel_lens")
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "include" / "tensorrt")
    for folder in places:
        if (folder / _HEADER).is_file():
            return folder
    raise PluginError(
        f"TensorRT's headers ({_HEADER}) are in none of {', '.join(map(str, places))}",
        hint="name their folder with --tensorrt-include or TENSORRT_INCLUDE_DIR; without a TensorRT install: "
        "pip install --no-deps kernel-lens",
    )


def tensorrt_header_version(folder: Path) -> str:
    """The version of TensorRT that headers belong to, as `10.14`.

    Raises:
        PluginError: It is older than 10.0, or cannot be told.
    """
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    numbers = []
    for part in ("MAJOR", "MINOR"):
        number = re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)?\s+(\d+)", text)
        if number is None:
            raise PluginError(f"{folder / 'NvInferVersion.h'} does not say its version")
        numbers.append(int(number[1]))
    if numbers[0] < 10:
        raise PluginError(
            f"{folder} holds TensorRT {numbers[0]}.{numbers[1]}, the plugins need 10.0 or later"
        )
    return f"{numbers[0]}.{numbers[1]}"


def cuda_headers() -> Path:
    """The folder with `cuda.h`: that of a CUDA toolkit, or the one Triton brings.

    Raises:
        PluginError: There is none.
    """
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.insert(0, Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for folder in places:
        if (folder / "cuda.h").is_file() and (folder / "cuda_runtime_api.h").is_file():
            return folder
    raise PluginError(
        f"cuda.h is in none of {', '.join(map(str, places))}", hint=install_command("plugins")
    )


def onnxruntime_headers(given: Path | None = None) -> Path | None:
    """The folder with ONNX Runtime's C header, or None where there is none.

    The AMX kernels compile without it, since no package registry has it. With it, the compiler
    compares their own table of its functions with it.

    Args:
        given: Look here and nowhere else. By default `ONNXRUNTIME_INCLUDE_DIR`, then where ONNX
            Runtime installs it.

    Raises:
        PluginError: The folder that is named has no such header.
    """
    named = given if given is not None else os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    if named:
        if not (Path(named) / _ONNXRUNTIME_HEADER).is_file():
            raise PluginError(
                f"{named} has no {_ONNXRUNTIME_HEADER}: it is not ONNX Runtime's include folder",
                hint="it is include/ in the archive onnxruntime-linux-x64-<version>.tgz of "
                "https://github.com/microsoft/onnxruntime/releases",
            )
        return Path(named)
    places = (Path(place) for place in _ONNXRUNTIME_SYSTEM)
    return next((place for place in places if (place / _ONNXRUNTIME_HEADER).is_file()), None)


def onnxruntime_api_version(folder: Path) -> str:
    """The version of ONNX Runtime's C API that a header describes: 29 for ONNX Runtime 1.29.

    Raises:
        PluginError: The header does not say it.
    """
    header = folder / _ONNXRUNTIME_HEADER
    text = header.read_text(encoding="utf-8", errors="replace")
    version = re.search(r"#define ORT_API_VERSION (\d+)", text)
    if version is None:
        raise PluginError(f"{header} does not say its version")
    return version[1]
