"""What is compared with PyTorch in float64: the graphs of a model directory, and engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.graph_variants import VNNI_GRAPH
from mmvision_export.artifacts.manifest import CPU_GRAPH, OPENVINO_GRAPH, PLANS, UNIFORM_GRAPH
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.processor import cpu_has_vnni
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.parity.encoders import Encoders
from mmvision_export.parity.graphs import LoadedGraph
from mmvision_export.parity.runners import BackendRunner, EngineRunner, SlotRunner, TorchRunner
from mmvision_export.parity.sessions import session_from_model
from mmvision_export.runtime.backends.cuda import current_compute_capability
from mmvision_export.runtime.backends.onnxruntime import create_session
from mmvision_export.runtime.backends.openvino import import_openvino

__all__ = [
    "Candidate",
    "candidate_from_engine",
    "candidates_from_graphs",
    "candidates_from_openvino",
    "candidates_from_plans",
    "candidates_from_pytorch",
    "eager_name",
]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to compare with PyTorch in float64.

    Attributes:
        subject: File name of the graph or engine, relative to the model directory; of PyTorch
            itself None.
        precision: Key of the gate table.
        float_type: fp32, fp16 or bf16: the type of the hidden states.
        runner: Runs it; its name says what and how.
    """

    subject: str | None
    precision: str
    float_type: str
    runner: BaseRunner


def eager_name(float_type: str) -> str:
    """What PyTorch in a float type is called as a runner."""
    return f"pytorch-{float_type}"


def candidates_from_pytorch(encoders: Encoders, float_types: Sequence[str]) -> list[Candidate]:
    """Eager PyTorch in each float type, which shows what the type costs by itself."""
    return [
        Candidate(
            None,
            name,
            name,
            TorchRunner(eager_name(name), partial(encoders.load, name), encoders.manifest.config),
        )
        for name in float_types
    ]


def candidates_from_graphs(
    graphs: Mapping[str, LoadedGraph],
    directory: Path,
    config: EncoderConfig,
    *,
    kernel_library: Path | None = None,
    progress: Progress,
) -> list[Candidate]:
    """Each graph in ONNX Runtime, as it is and, if it is float16 or bfloat16, rounded.

    The uniform graph gets each batch in slots. With a library of AMX kernels, the CPU's graph once
    more with its operators.
    """
    candidates = []
    for name, graph in graphs.items():
        facts = graph.facts
        if name == VNNI_GRAPH and not cpu_has_vnni():
            progress.note(f"{name} is not compared: this CPU has no VNNI, which the graph needs")
            continue
        if facts.float_type == "bf16":
            progress.note(
                f"{name} is bf16, which ONNX Runtime's CPU provider cannot run: every op is rounded instead"
            )
        else:
            load = _session_loader(directory / name)
            in_slots = graph.path.name == UNIFORM_GRAPH
            runner = SlotRunner(name, load, config) if in_slots else OnnxrtRunner(load, name=name)
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
            if name == CPU_GRAPH and kernel_library is not None:
                runner = OnnxrtRunner(
                    _session_loader(directory / name, kernel_library), name=f"{name} (AMX kernels)"
                )
                candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
        if facts.float_type != "fp32":
            runner = OnnxrtRunner(
                lambda model=graph.rounded: session_from_model(model, directory),
                name=f"{name} (rounded)",
            )
            candidates.append(Candidate(name, facts.precision, facts.float_type, runner))
    return candidates


def candidates_from_openvino(
    graphs: Mapping[str, LoadedGraph],
    directory: Path,
    config: EncoderConfig,
    *,
    progress: Progress,
) -> list[Candidate]:
    """The graph that OpenVINO opens, if there is one, in OpenVINO, if it is installed."""
    graph = next((name for name in (UNIFORM_GRAPH, OPENVINO_GRAPH) if name in graphs), None)
    if graph is None:
        return []
    try:
        import_openvino()
    except BackendError as error:
        progress.note(f"{graph} is compared in ONNX Runtime alone: {error.message}")
        return []
    name, facts = f"{graph} (OpenVINO)", graphs[graph].facts
    runner = BackendRunner(name, directory, backend="openvino", config=config)
    return [Candidate(graph, facts.precision, facts.float_type, runner)]


def _session_loader(graph: Path, operators: Path | None = None) -> Callable[[], Any]:
    return lambda: create_session(graph, provider="CPUExecutionProvider", operators=operators)


def candidate_from_engine(
    engine: Path, record: EngineRecord, *, graphs: Mapping[str, LoadedGraph], trust: bool
) -> Candidate:
    """An engine, judged as the graph it was built from, whose types it has.

    Args:
        engine: The file.
        record: Its sidecar.
        graphs: Name -> graph of the model directory.
        trust: Whether it is opened where this user has not built it (see `core.trust`).

    Raises:
        ManifestError: That graph is not among `graphs`.
    """
    name, source = f"{PLANS}/{engine.name}", record.graph.name
    if source not in graphs:
        raise ManifestError(
            f"{engine.name} was built from {source}, which the manifest does not list"
        )
    facts = graphs[source].facts
    return Candidate(
        name, facts.precision, facts.float_type, EngineRunner(name, engine, record, trust=trust)
    )


def candidates_from_plans(
    directory: Path, *, graphs: Mapping[str, LoadedGraph], trust: bool, progress: Progress
) -> list[Candidate]:
    """The engines of a model directory, if there is a GPU.

    Which of them fit it shows when they are opened.
    """
    if current_compute_capability() is None:
        return []
    found = []
    for engine in sorted((directory / PLANS).glob("*.engine")):
        try:
            record = EngineRecord.read(engine)
            candidate = candidate_from_engine(engine, record, graphs=graphs, trust=trust)
        except ManifestError as error:
            progress.note(f"{engine.name} is not compared: {error.message}")
            continue
        found.append(candidate)
    return found
