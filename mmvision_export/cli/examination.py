"""What works on this machine: packages, and what each backend can build and run, or why not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmvision_export.cli.machine import describe_machine
from mmvision_export.core.errors import MmvisionError
from mmvision_export.core.install import install_command
from mmvision_export.engine.target import supported_by_rtx
from mmvision_export.runtime.backends import AUTO_BACKENDS, BackendOptions, open_backend
from mmvision_export.runtime.backends.cuda import Cuda, current_compute_capability
from mmvision_export.runtime.backends.cuda_versions import (
    describe_driver,
    refuse_newer_cuda,
    tensorrt_cuda,
)
from mmvision_export.runtime.backends.tensorrt import import_tensorrt

__all__ = ["BackendReport", "Report", "choice_for", "examine"]

_PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "av",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "polygraphy",
    "safetensors",
    "huggingface_hub",
    "triton",
)


# What an extra brings, the extra, and the packages any of which means that it is here.
_BRINGS = (
    ("run graphs on a CPU", "cpu", ("onnxruntime", "onnxruntime-gpu")),
    ("bfloat16 on a CPU that has it", "openvino", ("openvino",)),
    ("export checkpoints to ONNX", "export", ("torch",)),
    ("compare with PyTorch", "parity", ("polygraphy",)),
    (
        "build engines for RTX GPUs, with no GPU here",
        "rtx",
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    ),
    (
        "build engines on a data-centre GPU",
        "tensorrt",
        ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    ),
    ("read videos", "video", ("av",)),
    ("compile the plugins' kernels", "plugins", ("triton",)),
)


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """One backend.

    Attributes:
        name: The backend.
        builds: What engines it can build here, or why none.
        runs: `yes`, or why not.
    """

    name: str
    builds: str
    runs: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What this machine has.

    Attributes:
        machine: Cores, memory, processor, what it multiplies fast, compiler; in words.
        packages: Version by name; None for one that is not installed.
        driver: The CUDA driver and GPU, or why there is none.
        backends: What `auto` may take.
    """

    machine: dict[str, str]
    packages: dict[str, str | None]
    driver: str
    backends: list[BackendReport]

    def missing(self) -> dict[str, str]:
        """What each package that is not here would bring, and the command that installs it."""
        return {
            what: install_command(extra)
            for what, extra, names in _BRINGS
            if all(self.packages.get(name) is None for name in names)
        }


def examine() -> Report:
    """Look at this machine. Never raises: what does not work is what the report is about."""
    packages: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return Report(
        describe_machine(),
        packages,
        _reason(lambda _: describe_driver(Cuda(0)), ""),
        [
            BackendReport(name, _reason(_builds, name), _reason(_runs, name))
            for name in AUTO_BACKENDS
        ],
    )


def _reason(question: Callable[[str], str], backend: str) -> str:
    try:
        return question(backend)
    except MmvisionError as error:
        return f"no: {error.message}" + (
            f" ({error.hint})" if error.hint and "doctor" not in error.hint else ""
        )


def _builds(backend: str) -> str:
    if not backend.startswith("tensorrt"):
        return "needs no engine"
    trt: Any = import_tensorrt(backend)
    if backend == "tensorrt-rtx":
        capabilities = ", ".join(map(str, supported_by_rtx(trt)))
        return f"yes, {trt.__version__}, for compute capability {capabilities}"
    here = current_compute_capability()
    return (
        f"yes, {trt.__version__}, for this GPU ({here})"
        if here
        else "no: there is no GPU to build for"
    )


def _runs(backend: str) -> str:
    if backend.startswith("tensorrt"):
        import_tensorrt(backend)
        cuda = Cuda(0)
        refuse_newer_cuda(cuda, backend)
        made_with = tensorrt_cuda(backend)
        of_cuda = "" if made_with is None else f" with CUDA {made_with[1]}"
        return f"yes{of_cuda}, on compute capability {cuda.compute_capability()}"
    if backend == "onnxruntime-rtx":
        from mmvision_export.runtime.backends.onnxruntime_gpu import rtx_devices

        return f"yes, on {len(rtx_devices())} device(s)"
    if backend == "openvino":
        from mmvision_export.runtime.backends.openvino import cpu_capabilities, import_openvino

        bf16 = "BF16" in cpu_capabilities(import_openvino().Core())
        return f"yes, in fp32{' and bf16' if bf16 else '; this CPU has no bf16'}"
    from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, require_provider

    require_provider(PROVIDERS[backend])
    if backend == "onnxruntime-cpu":
        return "yes"
    return f"yes, on compute capability {Cuda(0).compute_capability()}"


def choice_for(model: Path) -> dict[str, str]:
    """What `backend="auto"` makes of a model directory on this machine, by opening it.

    Returns:
        By backend, in the order of preference: why it was passed over, or that it was chosen. Those
        after the chosen one are not tried.
    """
    try:
        backend = open_backend(model, BackendOptions())
    except MmvisionError as error:
        return {"none": error.message}
    reasons: dict[str, str] = {
        **(backend.info.passed_over or {}),
        backend.name: "chosen: the first that works",
    }
    backend.close()
    return reasons
