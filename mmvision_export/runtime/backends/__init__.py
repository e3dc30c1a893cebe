"""The backends, one row each, and the choice between them.

A new backend is a file in this folder with a class (see `backend.Backend`) and a row in `BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.runtime.backends.backend import (
    Backend,
    BackendInfo,
    BackendOptions,
    DeviceBackend,
)

__all__ = [
    "AUTO_BACKENDS",
    "BACKENDS",
    "Backend",
    "BackendInfo",
    "BackendOptions",
    "BackendRow",
    "DeviceBackend",
    "open_backend",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendRow:
    """A row of the registry.

    Attributes:
        name: What users call it.
        module: Module of this folder that has its class, imported when the backend is opened.
        cls: The class, a `Backend`.
        opens_engines: Whether it runs engines of a model directory's `plans/`, rather than its
            graphs.
        takes: Options that only some backends take, of those that it does.
        is_automatic: Whether `auto` may take it.
    """

    name: str
    module: str
    cls: str
    opens_engines: bool = False
    takes: tuple[str, ...] = ()
    is_automatic: bool = True

    def load(self) -> type[Backend]:
        """The class. What it needs of others is imported when it is opened."""
        loaded: Any = importlib.import_module(f"{__name__}.{self.module}")
        cls: type[Backend] = getattr(loaded, self.cls)
        return cls


BACKENDS: dict[str, BackendRow] = {
    row.name: row
    for row in (
        BackendRow(
            name="tensorrt",
            module="tensorrt",
            cls="TensorRTBackend",
            opens_engines=True,
            takes=("weight_budget",),
        ),
        BackendRow(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            cls="TensorRTRTXBackend",
            opens_engines=True,
            takes=("weight_budget",),
        ),
        BackendRow(name="onnxruntime-rtx", module="onnxruntime_gpu", cls="RtxBackend"),
        BackendRow(
            name="onnxruntime-tensorrt",
            module="onnxruntime_gpu",
            cls="TensorRTProviderBackend",
            takes=("max_images", "max_patches"),
        ),
        BackendRow(name="onnxruntime-cuda", module="onnxruntime_gpu", cls="CudaBackend"),
        BackendRow(
            name="onnxruntime-cpu", module="onnxruntime", cls="CpuBackend", takes=("flavour",)
        ),
        BackendRow(
            name="onnxruntime-amx",
            module="onnxruntime_amx",
            cls="AmxBackend",
            takes=("flavour", "kernel_library"),
            # It runs a library that anybody may have put into the model directory.
            is_automatic=False,
        ),
        BackendRow(name="openvino", module="openvino", cls="OpenVinoBackend", takes=("precision",)),
    )
}
"""Fastest first: engines built ahead, then what builds them when it opens the graph, then kernel by
kernel, then the CPU. In float32 on a CPU neither ONNX Runtime nor OpenVINO is faster at every size
(docs/cpu.md): ONNX Runtime comes first, which needs nothing else."""

AUTO_BACKENDS = tuple(row.name for row in BACKENDS.values() if row.is_automatic)
"""Of these `auto` takes the first that works. The rest are used only where they are named."""

_WORKS_ANYWHERE = "onnxruntime-cpu"


def open_backend(path: Path, options: BackendOptions) -> Backend:
    """Load a model directory or an engine file into a runtime.

    Args:
        path: A model directory, or an `.engine` file.
        options: How. `auto` is the first of `AUTO_BACKENDS` that works; what was passed over, and
            why, is in `info.passed_over`.

    Raises:
        BackendError: The runtime is not installed, or does not work here.
        ManifestError: The files are missing, damaged, or not for this machine.
    """
    name = options.backend
    if path.is_file() and path.suffix != ".engine":
        raise BackendError(
            f"{path} is neither a model directory nor an .engine", hint="name the model directory"
        )
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            f"no such backend: {name}", hint=f"choose one of: auto, {', '.join(BACKENDS)}"
        )
    given = {
        option
        for row in BACKENDS.values()
        for option in row.takes
        if getattr(options, option) is not None
    }
    if name == "auto":
        return _open_best(
            path,
            options,
            [each for each in AUTO_BACKENDS if given <= set(BACKENDS[each].takes)],
            given,
        )
    _refuse_others(name, given - set(BACKENDS[name].takes))
    row = BACKENDS[name]
    if path.is_file() and not row.opens_engines:
        raise BackendError(f"{name} runs model directories, {path} is a file")
    return row.load().open(path, options)


def _refuse_others(name: str, options: Collection[str]) -> None:
    """Refuse options that a backend does not take."""
    for option in sorted(options):
        takers = " or ".join(row.name for row in BACKENDS.values() if option in row.takes)
        raise BackendError(
            f"{name} takes no {option.replace('_', ' ')}", hint=f"choose --backend {takers}"
        )


def _open_best(
    path: Path, options: BackendOptions, takers: Sequence[str], given: Collection[str]
) -> Backend:
    """The first that works of those that take the options that were given."""
    if not takers:
        _refuse_others("auto", given)
    order = [name for name in takers if BACKENDS[name].opens_engines or not path.is_file()]
    passed_over: dict[str, str] = {}
    for name in order:
        try:
            backend = open_backend(path, dataclasses.replace(options, backend=name))
        except (BackendError, ManifestError) as error:
            passed_over[name] = error.message
            if name == _WORKS_ANYWHERE and isinstance(error, ManifestError):
                raise  # it works on every machine: if its files are wrong, that is the error
            continue
        backend.info.chosen = f"{name}: the first that works here of {', '.join(order)}"
        backend.info.passed_over = passed_over
        return backend
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(
        f"no backend can run {path} here: {reasons}", hint="see: mmvision doctor"
    ) from None
