"""What is compared with PyTorch in float64: the graphs of a model directory, and engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import CPU_GRAPH, PLANS, Manifest
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.progress import Progress
from mmvision_export.parity.rounded import rounded_model
from mmvision_export.parity.runners import EngineRunner
from mmvision_export.parity.sessions import session_from_model
from mmvision_export.parity.stages import GraphFacts, facts_of_graph
from mmvision_export.runtime.backends import BackendOptions, open_backend
from mmvision_export.runtime.backends.cpu_kernels import find_cpu_kernels
from mmvision_export.runtime.backends.cuda import current_compute_capability
from mmvision_export.runtime.backends.onnxruntime import create_session

__all__ = ["Candidate", "candidates_from_path"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to compare with PyTorch in float64.

    Attributes:
        subject: File name of the graph or engine, relative to the model directory; of PyTorch itself None.
        precision: Key of the gate table.
        float_type: fp32, fp16 or bf16: the type of the hidden states.
        runner: Runs it; its name says what and how.
    """

    subject: str | None
    precision: str
    float_type: str
    runner: BaseRunner


def candidates_from_path(
    path: Path, directory: Path, manifest: Manifest, progress: Progress
) -> tuple[dict[str, tuple[Path, GraphFacts]], list[Candidate]]:
    """The graphs to look into layer by layer, and all there is to compare."""
    names = [name for name in manifest.files if name.endswith(".onnx")]
    engine = EngineRecord.read(path) if path.is_file() else None
    if engine is not None:
        open_backend(engine.backend, path, BackendOptions()).close()
        # An engine does not show its layers; the graph it was built from has the same types.
        names = [engine.graph["name"]]
    graphs, candidates = {}, []
    for name in names:
        manifest.verify(directory, [name])
        model = ir.load(directory / name)
        facts = facts_of_graph(model)
        manifest.verify(directory, facts.data_files)
        graphs[name] = (directory / name, facts)
        if engine is not None:
            continue
        if facts.float_type == "bf16":
            progress.note(
                f"{name} is bf16, which ONNX Runtime's CPU provider cannot run: every op is rounded instead"
            )
        else:
            runner = OnnxrtRunner(_session_loader(directory / name), name=name)
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
            if name == CPU_GRAPH and (kernels := find_cpu_kernels(directory)[0]):
                runner = OnnxrtRunner(
                    _session_loader(directory / name, kernels), name=f"{name} (AMX kernels)"
                )
                candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
        if facts.float_type != "fp32":
            rounded = rounded_model(model, facts.float_type)
            runner = OnnxrtRunner(
                lambda model=rounded: session_from_model(model, directory), name=f"{name} (rounded)"
            )
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
    if engine is not None:
        return graphs, [_engine_candidate(path, engine, directory)]
    return graphs, [*candidates, *_engines_for_this_machine(directory, progress)]


def _session_loader(graph: Path, kernels: Path | None = None) -> Callable[[], Any]:
    return lambda: create_session(graph, provider="CPUExecutionProvider", kernels=kernels)


def _engine_candidate(engine: Path, record: EngineRecord, directory: Path) -> Candidate:
    """Judged as the graph it was built from, whose types it has."""
    name = f"{PLANS}/{engine.name}"
    facts = facts_of_graph(ir.load(directory / record.graph["name"]))
    return Candidate(name, facts.precision, facts.float_type, EngineRunner(name, engine, record))


def _engines_for_this_machine(directory: Path, progress: Progress) -> list[Candidate]:
    if current_compute_capability() is None:
        return []
    found = []
    for engine in sorted((directory / PLANS).glob("*.engine")):
        try:
            record = EngineRecord.read(engine)
            open_backend(record.backend, engine, BackendOptions()).close()
        except (BackendError, ManifestError) as error:
            progress.note(f"{engine.name} is not compared: {error}")
            continue
        found.append(_engine_candidate(engine, record, directory))
    return found
