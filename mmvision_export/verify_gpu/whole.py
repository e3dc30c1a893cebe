"""All parts after the kernels, in order, in a folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.build_options import DEFAULT_OPTIONS
from mmvision_export.artifacts.build_target import TENSORRT_NAMES
from mmvision_export.artifacts.manifest import PLANS, Manifest
from mmvision_export.core.errors import BackendError
from mmvision_export.core.progress import Progress
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.tensorrt import import_tensorrt
from mmvision_export.verify_gpu.arrays import check_arrays
from mmvision_export.verify_gpu.budget import SHARES, Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, Opener, open_engine
from mmvision_export.verify_gpu.captures import check_captures
from mmvision_export.verify_gpu.engines import (
    build_engines,
    build_in,
    check_engine,
    engine_sizes,
)
from mmvision_export.verify_gpu.findings import Findings
from mmvision_export.verify_gpu.latency import check_latency
from mmvision_export.verify_gpu.leaks import check_leaks
from mmvision_export.verify_gpu.reference import engine_precision, reference_from_directory
from mmvision_export.verify_gpu.refusals import check_refusals
from mmvision_export.verify_gpu.runtime_cache import check_runtime_cache
from mmvision_export.verify_gpu.sanitizer import check_sanitizer

__all__ = ["check_model", "model_copy", "tensorrt_versions"]


def tensorrt_versions() -> dict[str, str]:
    """Backend -> version of its TensorRT, or why there is none."""
    versions: dict[str, str] = {}
    for backend in TENSORRT_NAMES:
        try:
            versions[backend] = str(import_tensorrt(backend).__version__)
        except BackendError as error:
            versions[backend] = f"no: {error.message}"
    return versions


def check_model(
    model: Path,
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    *,
    folder: Path,
    output: Path,
    progress: Progress,
    opener: Opener = open_engine,
) -> None:
    """Build the engines of a model directory and check them.

    Args:
        model: The model directory, which is not changed.
        cuda: The GPU.
        findings: Where to put what is found; written after each part, so that a crash of the driver
            costs one part.
        budget: How long each part may take.
        folder: An existing folder for a copy of the model directory and for the engines.
        output: Where the findings are written.
        progress: Told about each step.
        opener: Opens engines.
    """
    if findings.is_stand_in:
        for part in list(SHARES)[1:]:
            findings.not_run(part, "all", "no GPU")
        return
    options = BackendOptions(device=cuda.device)
    how: Any = {"options": options, "opener": opener}
    directory = model_copy(model, folder / model.resolve().name)
    engines: list[BuiltEngine] = []
    with findings.failure_is_a_finding("engines", "all"):
        engines += _engines(directory, findings, budget, options, opener, progress)
    findings.write(output)
    if not engines:
        for part in list(SHARES)[2:]:
            findings.not_run(part, "all", "there is no engine")
        return
    parts: dict[str, Callable[[], None]] = {
        "captures": lambda: check_captures(engines, findings, budget, **how),
        "leaks": lambda: check_leaks(engines, cuda, findings, budget, **how),
        "latency": lambda: check_latency(engines, cuda, findings, budget, **how),
        "arrays": lambda: check_arrays(engines, cuda, findings, budget, **how),
        "refusals": lambda: check_refusals(engines, findings, budget, folder=folder, **how),
        "runtime cache": lambda: check_runtime_cache(engines, findings, budget, **how),
        "sanitizer": lambda: check_sanitizer(engines, findings, budget),
    }
    for part, check in parts.items():
        progress.step(part)
        with findings.failure_is_a_finding(part, "all"):
            check()
        findings.write(output)


def _engines(
    directory: Path,
    findings: Findings,
    budget: Budget,
    options: BackendOptions,
    opener: Opener,
    progress: Progress,
) -> list[BuiltEngine]:
    manifest = Manifest.read(directory)
    reference = reference_from_directory(directory, progress=progress)
    build = build_in(directory, engine_precision(manifest), options.device, progress)
    sizes = engine_sizes(manifest.config)
    engines = []
    for engine in build_engines(findings, budget, sizes=sizes, build=build):
        # At once: should time run out, what was built was compared too.
        check_engine(engine, reference, findings, options=options, opener=opener)
        # The other parts ask what no option changes.
        if engine.record.options == DEFAULT_OPTIONS:
            engines.append(engine)
    return engines


def model_copy(model: Path, target: Path) -> Path:
    """A model directory that may be changed while the first is not, without its engines.

    A copy and no links: onnx-ir refuses weights in a file that has several names.
    """
    ignored = shutil.ignore_patterns(PLANS, ".*")
    return Path(shutil.copytree(model, target, copy_function=shutil.copyfile, ignore=ignored))
