"""Engines of every TensorRT and way of attention, held to ONNX Runtime's result on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mmvision_export.artifacts.build_options import DEFAULT_OPTIONS, BuildOptions
from mmvision_export.artifacts.build_target import TENSORRT_NAMES, TensorRTName
from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.layer_counts import layers_path
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.plugin_library import default_library
from mmvision_export.artifacts.profile import (
    DEFAULT_PROFILE,
    DEFAULT_SLOTS,
    Profile,
    profiles_from_buckets,
    profiles_from_slots,
)
from mmvision_export.core.errors import BackendError, EngineError, ManifestError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import choose_lowering
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay
from mmvision_export.engine.option_support import BuildRequest, refuse_options
from mmvision_export.engine.target import resolve_target
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.tensorrt import import_tensorrt
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import (
    BuiltEngine,
    Opener,
    encoder_from_backend,
    open_engine,
)
from mmvision_export.verify_gpu.findings import Findings
from mmvision_export.verify_gpu.reference import Reference

__all__ = ["EngineCase", "build_engines", "build_in", "check_engine", "engine_sizes"]

_PART = "engines"
# Which sizes each way is built for, by the names of `engine_sizes`.
_WAYS: dict[AttentionWay, tuple[str, ...]] = {
    "plugin": ("buckets", "dynamic"),
    "packed": ("buckets", "dynamic"),
    "uniform": ("slots",),
    "native": ("buckets", "dynamic"),
}
# After all ways, with the sizes and the way that every TensorRT has and that build fastest.
_OPTIONS = (
    BuildOptions(strip_weights=True),
    BuildOptions(strip_weights=True, refit=True),
    BuildOptions(weight_streaming=True),
    BuildOptions(version_compatible=True),
    BuildOptions(hardware="ampere-plus"),
)
_BUCKETS = (256, 1024, 2304, 4096)  # a still image of the released preprocessing has at most 2304


@dataclasses.dataclass(frozen=True)
class EngineCase:
    """An engine to build."""

    tensorrt: TensorRTName
    way: AttentionWay
    sizes: str
    options: BuildOptions = DEFAULT_OPTIONS

    @property
    def name(self) -> str:
        """As `tensorrt, plugin, buckets`, and the options if there are any."""
        return ", ".join((self.tensorrt, self.way, self.sizes, *self.options.words))


Build = Callable[[EngineCase, Sequence[Profile]], tuple[Path, EngineRecord]]


def engine_sizes(config: EncoderConfig) -> dict[str, list[Profile]]:
    """Name -> profiles: what `build-engine` does by default, with slots, and with buckets."""
    return {
        "dynamic": [DEFAULT_PROFILE],
        "slots": profiles_from_slots(DEFAULT_SLOTS, SLOT_WAYS["uniform"], config),
        "buckets": profiles_from_buckets(_BUCKETS, [DEFAULT_PROFILE.max_images], config),
    }


def build_in(directory: Path, precision: str, device: int | None, progress: Progress) -> Build:
    """Builds as `mmvision build-engine` does, into a model directory that may be changed.

    Engine, sidecar and layer report are then given the case's name: engines of one TensorRT share a name.
    """

    def build(case: EngineCase, profiles: Sequence[Profile]) -> tuple[Path, EngineRecord]:
        manifest = Manifest.read(directory)
        refuse_impossible(case, directory, manifest, precision, device)
        engine, record = build_engine(
            directory,
            manifest,
            profiles=profiles,
            precision=precision,
            backend=case.tensorrt,
            attention=case.way,
            options=case.options,
            device=device,
            check=False,  # `Reference` has derived the graph, and what fails shall be seen to
            force=True,
            progress=progress,
        )
        own = engine.with_name(f"{engine.stem}.{case.way}-{case.sizes}{engine.suffix}")
        return _renamed(engine, own, record)

    return build


def _renamed(engine: Path, own: Path, record: EngineRecord) -> tuple[Path, EngineRecord]:
    """An engine with its sidecar and layer report under another name, in the same folder."""
    if record.layers is not None:
        layers_path(engine).rename(layers_path(own))
        file = dataclasses.replace(record.layers.file, name=layers_path(own).name)
        record = dataclasses.replace(record, layers=dataclasses.replace(record.layers, file=file))
    record.write(sidecar_path(own))
    sidecar_path(engine).unlink()
    return engine.rename(own), record


class ImpossibleError(EngineError):
    """A way of attention is not open on this machine: nothing failed, there is nothing to try."""


def refuse_impossible(
    case: EngineCase, directory: Path, manifest: Manifest, precision: str, device: int | None
) -> None:
    """Refuse what cannot be asked of this TensorRT, before it is.

    Raises:
        ImpossibleError: Says why.
    """
    try:
        target = resolve_target(
            directory,
            manifest,
            precision=precision,
            backend=case.tensorrt,
            compute_capabilities=(),
            device=device,
            options=case.options,
            progress=Progress(),
        )
        refuse_options(
            BuildRequest(
                target=target,
                module=import_tensorrt(target.backend),
                timing_cache=None,
                has_gpu=True,
            )
        )
        choose_lowering(
            case.way,
            target,
            config=manifest.config,
            library=default_library(),
            is_named=False,
            progress=Progress(),
        )
    except (EngineError, ManifestError) as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise ImpossibleError(f"{error.message}{hint}") from error


def build_engines(
    findings: Findings,
    budget: Budget,
    *,
    sizes: Mapping[str, Sequence[Profile]],
    build: Build,
    is_installed: Callable[[str], object] = import_tensorrt,
) -> Iterator[BuiltEngine]:
    """Build an engine of every case; what cannot be built is a finding.

    Args:
        findings: Where to put it.
        budget: When to stop.
        sizes: Name -> profiles.
        build: Builds one.
        is_installed: Raises `BackendError` for a TensorRT that is not there.

    Yields:
        Each engine as it is built.
    """
    for backend in TENSORRT_NAMES:
        try:
            is_installed(backend)
        except BackendError as error:
            findings.not_run(_PART, backend, error.message)
            continue
        # Buckets of every way come before the other sizes of any: should time run out, more ways
        # were seen.
        cases = [
            EngineCase(backend, way, name)
            for name, way in itertools.product(reversed(list(sizes)), _WAYS)
            if name in _WAYS[way]
        ]
        cases += [EngineCase(backend, "native", "dynamic", options) for options in _OPTIONS]
        for case in cases:
            if not budget.allows(_PART, case.name, findings):
                continue
            if (engine := _built(case, sizes[case.sizes], findings, build)) is not None:
                yield engine


def _built(
    case: EngineCase, profiles: Sequence[Profile], findings: Findings, build: Build
) -> BuiltEngine | None:
    began = time.monotonic()
    with findings.failure_is_a_finding(_PART, f"{case.name}, built"):
        try:
            path, record = build(case, profiles)
        except ImpossibleError as error:
            findings.not_run(_PART, case.name, str(error))
            return None
        numbers = {
            "build_seconds": time.monotonic() - began,
            "engine_bytes": float(record.engine.size_bytes),
        }
        says = f"TensorRT {record.tensorrt_version}, attention: {record.attention}"
        findings.judge(_PART, f"{case.name}, built", [], numbers, says)
        return BuiltEngine(case.name, path, record)
    return None


def check_engine(
    engine: BuiltEngine,
    reference: Reference,
    findings: Findings,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Hold an engine to the reference on every sample, with the gate of its precision."""
    gate = PRECISIONS[engine.record.precision].gate
    if engine.record.options.weight_streaming:
        # All that can be streamed is.
        options = dataclasses.replace(options, weight_budget=0)
    with findings.failure_is_a_finding(_PART, f"{engine.name}, opened"):
        backend = opener(engine.path, options)
        with encoder_from_backend(backend, refuse_non_finite=False) as encoder:
            for sample in reference.samples:
                case = f"{engine.name}, {sample.name}"
                with findings.failure_is_a_finding(_PART, case):
                    given = encoder(sample.pixel_values, sample.grid_thw)
                    found = metrics(given, reference.expected[sample.name])
                    beside = reference.beside.get(sample.name)
                    numbers = {"relative_l2": found.relative_l2, "min_cosine": found.min_cosine}
                    if (limit := gate.limit(beside)) is not None:
                        numbers["limit_relative_l2"] = limit
                    findings.judge(_PART, case, gate.failures(found, beside), numbers)
