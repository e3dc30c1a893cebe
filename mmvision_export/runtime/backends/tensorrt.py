"""TensorRT engines.

Written against the API of TensorRT 10.3 and later. On the machines this project is developed on
there is no GPU: the calls are checked against type stubs and driven through a stand-in that
enforces TensorRT's rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import platform as host
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.build_target import Installation, TensorRTName, TensorRTVersion
from mmvision_export.artifacts.engine_record import EngineRecord, refuse_foreign_engine
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError
from mmvision_export.core.install import install_command
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.trust import refuse_untrusted
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.backends.backend import BackendInfo, BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.backends.engine_tensors import refuse_other_tensors
from mmvision_export.runtime.backends.engine_weights import budget_weights, put_weights
from mmvision_export.runtime.backends.engines import open_fitting
from mmvision_export.runtime.backends.launch_lane import Lane
from mmvision_export.runtime.backends.plugin_library import load_plugin_library
from mmvision_export.runtime.memory_guard import MemoryGuard
from mmvision_export.runtime.slot_planner import planner_for_engine

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TENSORRT_MODULES", "TensorRTBackend", "current_platform", "import_tensorrt"]

TENSORRT_MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module."""

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def import_tensorrt(backend: str) -> Any:
    """The module of a TensorRT backend.

    Raises:
        BackendError: It is not installed, or its libraries cannot be loaded.
    """
    name = TENSORRT_MODULES[backend]
    hint = install_command(_EXTRAS[backend])
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} cannot be imported: {error}", hint=hint) from error
    if not hasattr(module, "Runtime"):  # a folder of that name, such as type stubs bring
        raise BackendError(f"{name} is not installed", hint=hint)
    return module


def current_platform() -> str:
    """This machine as engines name it: `linux-x86_64`."""
    return f"{host.system().lower()}-{host.machine().lower()}"


class TensorRTBackend:
    """One engine, with a lane for each stream.

    Contexts, buffers and CUDA graphs of its own. See `Backend`.

    Safe for use by several threads: a call takes a free lane, and waits for one if there is none.

    Args:
        engine: The engine file.
        options: How.
        module: `tensorrt`, or what has its API.
        cuda: The device.
        manifest: Of the model directory the engine lies in, if it does.

    Raises:
        ManifestError: The engine is not for this machine or graph.
        BackendError: TensorRT or CUDA refused a step.
    """

    name = "tensorrt"
    kind: ClassVar[TensorRTName] = "tensorrt"
    guard: MemoryGuard | None = None

    @classmethod
    def open(cls, path: Path, options: BackendOptions) -> TensorRTBackend:
        """See `Backend.open`."""
        module, cuda = import_tensorrt(cls.kind), Cuda(options.device)
        return open_fitting(
            path,
            lambda engine, manifest: cls(
                engine,
                dataclasses.replace(
                    options, trust=path.is_file() if options.trust is None else options.trust
                ),
                module=module,
                cuda=cuda,
                manifest=manifest,
            ),
        )

    def __init__(
        self,
        engine: Path,
        options: BackendOptions,
        *,
        module: Any,
        cuda: Cuda,
        manifest: Manifest | None,
    ) -> None:
        record = EngineRecord.read(engine)
        compute_capability = cuda.compute_capability()
        refuse_foreign_engine(
            engine,
            record,
            here=Installation(
                backend=self.kind,
                tensorrt_version=TensorRTVersion(str(module.__version__)),
                platform=current_platform(),
            ),
            compute_capability=compute_capability,
            manifest=manifest,
        )
        self.config = record.config
        self.profiles: Sequence[Profile] = record.profiles
        self.dtype: np.dtype[Any] = np.dtype(PRECISIONS[record.precision].io_dtype)
        self._planner = planner_for_engine(record.attention, self.profiles, self.config)
        self.is_isolated = not record.attention.masked
        self.largest_image = self._planner.largest_image
        self._cuda_graphs = options.cuda_graphs and any(p.is_bucket for p in record.profiles)
        self.info = BackendInfo(
            runtime="tensorrt",
            version=str(record.tensorrt_version),
            precision=record.precision,
            weights_sha256=_weights_of(record, manifest),
            engine=str(engine),
            attention=str(record.attention),
            splitting=self._planner.splitting,
            compute_capability=str(compute_capability),
            cuda_graphs=self._cuda_graphs,
            profiles=[self._planner.size_text(i) for i in range(len(record.profiles))],
            streams=options.streams,
        )
        self.device = cuda.device
        self._cuda = cuda
        self._engine: trt.ICudaEngine | None = None
        self._lanes: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._num_lanes = 0
        self._cleanup = contextlib.ExitStack()
        try:
            self._open(engine, record, module, options, manifest)
        except BaseException:
            with contextlib.suppress(BackendError):  # the first error is the one to report
                self.close()
            raise

    def _open(
        self,
        path: Path,
        record: EngineRecord,
        module: Any,
        options: BackendOptions,
        manifest: Manifest | None,
    ) -> None:
        refuse_untrusted(path, record.engine.sha256, named=bool(options.trust))
        with record.verified_map(path) as plan:
            if (plugins := record.plugin_library) is not None:
                library = plugins.verify(path)
                refuse_untrusted(library, plugins.record.sha256, named=bool(options.trust))
                load_plugin_library(module, library, plugins.record.sha256)
                self.info.plugin_library = plugins.name
            self._cuda.use()
            self._logger = _logger(module)
            runtime: trt.Runtime = self._checked(module.Runtime(self._logger), "create a runtime")
            # It brings a runtime of its own, which is code, as the engine is that was trusted above.
            runtime.engine_host_code_allowed = record.options.version_compatible
            self._engine = self._checked(
                runtime.deserialize_cuda_engine(plan), f"deserialise {path}"
            )
        refuse_other_tensors(
            path, self._engine, config=self.config, dtype=self.dtype, profiles=self.profiles
        )
        self._give_weights(path, record, module, options, manifest)
        for _ in range(options.streams):
            lane = Lane(
                self._cuda,
                self._checked,
                self.config,
                self.dtype,
                self.profiles,
                captures=self._captures,
            )
            self._cleanup.callback(lane.close)
            lane.open(self._engine, lambda: self._new_context(module))
            if options.capture_on_open:
                lane.capture_all(self._planner.idle)
                self._note_refusals(lane)
            self._lanes.put(lane)
            self._num_lanes += 1

    def _give_weights(
        self,
        path: Path,
        record: EngineRecord,
        module: Any,
        options: BackendOptions,
        manifest: Manifest | None,
    ) -> None:
        """What has to be done before the engine has a context."""
        if manifest is not None and record.takes_other_weights(self.info.weights_sha256):
            put_weights(
                self._engine,
                path,
                record,
                manifest,
                options,
                module=module,
                logger=self._logger,
                checked=self._checked,
            )
            self.info.refitted = True
        budget = budget_weights(self._engine, path, options.weight_budget)
        if budget is not None:
            self.info.streamable_weight_bytes, self.info.resident_weight_bytes = budget
            if budget[1] < budget[0]:
                # TensorRT-RTX: "Weight streaming is incompatible with CUDA graph capture."
                self._cuda_graphs = self.info.cuda_graphs = False

    @property
    def _captures(self) -> bool:
        return self._cuda_graphs

    def _new_context(self, module: Any) -> trt.IExecutionContext:
        """A context without memory of its own."""
        assert self._engine is not None
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext = self._checked(
            self._engine.create_execution_context(strategy), "create a context"
        )
        return context

    def run(self, batch: PackedBatch) -> npt.NDArray[np.floating]:
        """See `Backend.run`."""
        shape = (batch.grid.num_tokens, self.config.text_hidden_size)
        image_embeds = np.empty(shape, dtype=self.dtype)
        self.run_into(image_embeds, batch, stream=None)
        return image_embeds

    def run_into(
        self,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        batch: PackedBatch,
        *,
        stream: int | None,
    ) -> None:
        """See `DeviceBackend.run_into`."""
        layouts = self._planner.layouts(batch.grid)
        with self._lane() as lane:
            self._cuda.use()
            lane.run(layouts, batch, image_embeds, stream=stream)
            self._note_refusals(lane)

    def _note_refusals(self, lane: Lane) -> None:
        if lane.refusals:
            self.info.captures_refused = {
                self._planner.size_text(index): reason for index, reason in lane.refusals.items()
            }

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        if self._engine is None:
            raise BackendError("the encoder is closed")
        lane = self._lanes.get()
        try:
            if self._engine is None:  # closed while this call waited
                raise BackendError("the encoder is closed")
            yield lane
        finally:
            self._lanes.put(lane)

    def close(self) -> None:
        """See `Backend.close`. Waits for the calls that are running."""
        engine, self._engine = self._engine, None
        idle = [self._lanes.get() for _ in range(self._num_lanes)]
        try:
            self._cuda.use()  # whichever thread this is
            self._cleanup.close()
        finally:
            # TensorRT asks that contexts go before their engine.
            del engine
            self._cuda.close()
            for lane in idle:  # whoever waits for one is told
                self._lanes.put(lane)

    def _checked(self, result: Any, what: str) -> Any:
        """Turn TensorRT's None or False into an error with what it logged."""
        if result is None or result is False:
            reason = "; ".join(self._logger.errors) or "it gave no reason"
            self._logger.errors.clear()
            raise BackendError(f"TensorRT could not {what}: {reason}", hint="see: mmvision doctor")
        return result


def _weights_of(record: EngineRecord, manifest: Manifest | None) -> str:
    """Hash of the weights that an engine computes with: those of its directory, if it takes them."""
    name = f"{record.graph.name}.data"
    if manifest is None or not record.options.takes_weights:
        return record.graph.data_sha256
    return manifest.record_of(name).sha256


def _logger(module: Any) -> Any:
    """A TensorRT logger that keeps the errors, for the message of the exception that follows.

    What is less than an error goes to Python's logger `mmvision_export.tensorrt`.
    """
    severities = module.ILogger.Severity
    errors = (severities.ERROR, severities.INTERNAL_ERROR)
    levels = {severities.WARNING: logging.WARNING, severities.INFO: logging.INFO}
    log = logging.getLogger("mmvision_export.tensorrt")

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                self.errors.append(message)
            else:
                log.log(levels.get(severity, logging.DEBUG), "%s", message)

    return Logger()
