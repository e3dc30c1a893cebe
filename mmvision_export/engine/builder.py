"""Parser and builder of TensorRT or TensorRT-RTX, driven through Polygraphy's loaders."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmvision_export.artifacts.build_options import size_text
from mmvision_export.artifacts.build_target import BuildTarget, TensorRTName
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import EngineError
from mmvision_export.core.progress import Progress
from mmvision_export.engine.builder_config import config_from_target, set_options
from mmvision_export.engine.layer_report import LISTING, report_from_inspector, report_from_listing
from mmvision_export.engine.polygraphy_setup import (
    captured_messages,
    messages_that_begin,
    use_tensorrt,
)
from mmvision_export.engine.timing_cache import TimingCache
from mmvision_export.runtime.backends.tensorrt import import_tensorrt

__all__ = ["BuilderError", "Plan", "PlanRequest", "plan_from_model"]

# TensorRT reports each tactic that lacks memory as an error, and a layer left with none as one
# without an implementation: https://github.com/NVIDIA/TensorRT/issues/2643 and 477.
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|could not be allocated", re.IGNORECASE)


_WORKSPACE = re.compile(r"workspace (?:limit|memory)", re.IGNORECASE)


class BuilderError(EngineError):
    """The builder gave no plan for a graph that its parser took, and not for lack of memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to build.

    Attributes:
        model: A serialised ONNX model without its weights.
        location: The file it comes from, beside which the parser finds the weights.
        target: What to build with and for.
        profiles: Accepted sizes, one optimization profile for each entry.
        patch_dim: Values in one patch row.
        timing_cache: Read if it exists, extended afterwards. None for TensorRT-RTX, which times
            nothing when it builds.
    """

    model: bytes
    location: Path
    target: BuildTarget
    profiles: Sequence[Profile]
    patch_dim: int
    timing_cache: TimingCache | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was built.

    Attributes:
        content: The engine's bytes.
        model: The serialised model that it was built from, without its weights.
        layers: Its layers, in the engine inspector's JSON; None where nobody listed them.
    """

    content: bytes
    model: bytes = b""
    layers: bytes | None = None


def plan_from_model(request: PlanRequest, *, decomposable: bool, progress: Progress) -> Plan:
    """Parse a model and build its plan.

    Args:
        request: What to build.
        decomposable: Whether attention layers may be built from several kernels.
        progress: Told the builder's phases.

    Raises:
        BuilderError: The builder failed; with everything that it reported.
        EngineError: The graph was not parsed, or memory ran out; with everything that was reported.
    """
    use_tensorrt(request.target.backend)
    trt = import_tensorrt(request.target.backend)
    from polygraphy.backend.trt import EngineBytesFromNetwork, SetDecomposableAttentions
    from polygraphy.exception import PolygraphyException

    progress.step("parsing the graph")
    with (
        captured_messages() as messages,
        messages_that_begin(LISTING) as listings,
        _monitor(trt, progress) as monitor,
    ):
        kind: type[EngineError] = EngineError
        try:
            network = _network_from_model(trt, request.model, request.location)
            if decomposable and hasattr(trt.LayerType, "ATTENTION_INPUT"):
                network = SetDecomposableAttentions(network)()
            cache = request.timing_cache
            timings = b"" if cache is None else cache.content_for(network[0], progress)
            config = config_from_target(
                trt,
                request.target,
                profiles=request.profiles,
                patch_dim=request.patch_dim,
                monitor=monitor,
                timings=timings,
            )(network[0], network[1])
            set_options(trt, config, request.target.options)
            kind = BuilderError
            content = bytes(EngineBytesFromNetwork(network, config=config)())
            if cache is not None:
                cache.keep(config, progress)
        except PolygraphyException as error:
            if monitor.cancelled:
                raise KeyboardInterrupt from None
            limit = request.target.options.workspace_bytes
            raise _failure(kind, [*messages, str(error)], limit) from error
        if not monitor.cancelled:
            layers = _layers(trt, request.target.backend, content, listings, progress)
    if monitor.cancelled:
        raise KeyboardInterrupt
    return Plan(content, request.model, layers)


def _layers(
    trt: Any, backend: TensorRTName, plan: bytes, listings: Sequence[str], progress: Progress
) -> bytes | None:
    """The plan's layers. An engine is as good without a report of them."""
    from polygraphy.backend.trt.util import get_trt_logger

    progress.step("listing the layers")
    try:
        if backend == "tensorrt-rtx":
            return report_from_listing(listings)
        return report_from_inspector(trt, get_trt_logger(), plan)
    except EngineError as error:
        progress.note(f"the engine has no report of its layers: {error.message}")
        return None


def _failure(
    kind: type[EngineError], messages: Sequence[str], workspace_bytes: int | None
) -> EngineError:
    reasons = list(dict.fromkeys(messages))
    text = "the engine was not built:\n  " + "\n  ".join(reasons)
    if any(map(_OUT_OF_MEMORY.search, reasons)):
        return EngineError(
            text,
            hint="memory ran out: free some, or build for less with --max-patches or --buckets",
        )
    if workspace_bytes is not None and any(map(_WORKSPACE.search, reasons)):
        return EngineError(
            text, hint=f"--workspace {size_text(workspace_bytes)} is too little: give more, or none"
        )
    return kind(text)


def _network_from_model(trt: Any, model: bytes, location: Path) -> tuple[Any, Any, Any]:
    from polygraphy.backend.trt import CreateNetwork
    from polygraphy.backend.trt.util import get_trt_logger

    builder, network = CreateNetwork(strongly_typed=True)()
    trt.init_libnvinfer_plugins(get_trt_logger(), "")
    parser = trt.OnnxParser(network, get_trt_logger())
    # Polygraphy's own loaders parse bytes or a file; this is bytes whose weights lie beside a file.
    if not parser.parse(model, str(location)):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            "\n  ".join([f"TensorRT {trt.__version__} cannot parse {location.name}:", *errors])
        )
    return builder, network, parser


def _parser_error(error: Any) -> str:
    stack = (
        " in " + " / ".join(error.local_function_stack())
        if error.local_function_stack_size()
        else ""
    )
    node = f"{error.node_name() or 'model'} ({error.node_operator() or 'no operator'})"
    return f"{node}{stack}: {error.desc()}"


@contextlib.contextmanager
def _monitor(trt: Any, progress: Progress) -> Iterator[Any]:
    """A progress monitor that reports the outermost phases, and stops the build on a signal.

    The builder runs in native code, where Python's KeyboardInterrupt cannot be raised. SIGINT and
    SIGTERM only set a flag, and the monitor's next answer tells the builder to stop.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._outermost: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._outermost = phase_name
                progress.step(phase_name[:1].lower() + phase_name[1:], total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._outermost:
                progress.advance()
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = Monitor()

    def cancel(signum: int, frame: FrameType | None) -> None:
        monitor.cancelled = True

    # Signals come to the main thread only.
    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, cancel) for number in signals}
    try:
        yield monitor
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
