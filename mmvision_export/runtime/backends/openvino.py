"""OpenVINO on the CPU: the flavour of the graph that it can read, in float32 or bfloat16."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.manifest import DATA, OPENVINO_GRAPH, UNIFORM_GRAPH, Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.install import install_command
from mmvision_export.core.verified_files import verify_file
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.available_memory import host_available_bytes
from mmvision_export.runtime.backends.backend import BackendInfo, BackendOptions
from mmvision_export.runtime.launch_planner import Launch, LaunchPlanner
from mmvision_export.runtime.mapped_weights import MappedWeights
from mmvision_export.runtime.memory_guard import MemoryGuard
from mmvision_export.runtime.planner import Planner, run_layouts
from mmvision_export.runtime.slot_planner import SlotLaunch, SlotPlanner

if TYPE_CHECKING:
    import openvino

__all__ = ["PRECISIONS", "OpenVinoBackend", "cpu_capabilities", "import_openvino"]

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""What it can compute in: our name -> OpenVINO's."""

_DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The module `openvino`, without its telemetry.

    `import openvino` sends an event to Google Analytics, and writes a client id and a count of
    uses under the home folder (`openvino/tools/ovc/__init__.py`, `openvino_telemetry/main.py`).
    Only the variables of CI services turn that off. Where the package `openvino_telemetry` is
    missing, OpenVINO takes its own stub: so the package is hidden while OpenVINO is imported.

    Raises:
        BackendError: OpenVINO is not installed, or its libraries cannot be loaded.
    """
    if (loaded := sys.modules.get("openvino")) is not None:
        return loaded
    hidden = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] == _TELEMETRY
    }
    # None makes an import of that name fail (docs.python.org/3/reference/import.html, 5.3.1).
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"OpenVINO cannot be imported: {error}", hint=install_command("openvino")
        ) from error
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(hidden)


def cpu_capabilities(core: openvino.Core) -> tuple[str, ...]:
    """The types that this CPU computes in, as OpenVINO names them: `FP32`, `BF16`, ..."""
    return tuple(core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))


class OpenVinoBackend:
    """A model directory's `model.uniform.onnx` in OpenVINO, on the CPU. See `Backend`.

    Images of like size share a launch, each in a slot of its own, so that attention costs about the
    sum of their squares. A directory from before there was that graph has `model.openvino.onnx`,
    whose attention is masked and costs the square of a launch: there a batch is cut between images.

    Calls of several threads take turns, launch by launch: each launch uses the whole thread pool.

    Raises:
        ManifestError: Files of the directory are missing or not those of its manifest.
        BackendError: OpenVINO is not installed or cannot load the graph, or the CPU lacks the
            precision.
    """

    name = "openvino"
    profiles: Sequence[Profile] = ()
    largest_image: int | None = None

    def __init__(self, directory: Path, options: BackendOptions) -> None:
        precision = options.precision or "fp32"
        if precision not in PRECISIONS:
            raise BackendError(
                f"{self.name} computes in {' or '.join(PRECISIONS)}, got {precision!r}"
            )
        manifest = Manifest.read(directory)
        graph = _graph_of(directory, manifest)
        openvino: Any = import_openvino()
        core = openvino.Core()
        device = str(core.get_property(_DEVICE, "FULL_DEVICE_NAME"))
        if precision == "bf16" and "BF16" not in (found := cpu_capabilities(core)):
            raise BackendError(
                f"bf16 needs a CPU with products of bfloat16; this one ({device}) has none: "
                f"OpenVINO finds {', '.join(found)}",
                hint="leave the precision out: fp32 runs on every CPU",
            )
        # The graph is small and hashed at each opening, the weights once.
        manifest.verify(directory, [graph])
        self._weights = MappedWeights([directory / DATA])
        verify_file(
            manifest.record_of(DATA),
            manifest.path_of(directory, DATA),
            said_by="the manifest",
            when=options.verify,
            progress=options.progress,
        )
        settings: dict[str, Any] = {
            # Where the CPU has bfloat16, that would be the default.
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            # Weights are mapped from their file; kernels keep copies in the order they need.
            compiled = core.compile_model(str(directory / graph), _DEVICE, settings)
        except Exception as error:  # OpenVINO's exceptions have no common base
            raise BackendError(f"OpenVINO cannot load {graph}: {error}") from error
        # What a CPU has not, it replaces by float32 without a word.
        if (chosen := compiled.get_property("INFERENCE_PRECISION_HINT")) != getattr(
            openvino.Type, PRECISIONS[precision]
        ):
            raise BackendError(f"OpenVINO computes in {chosen} here, not in {precision}")
        self.config = manifest.config
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self._request: Any = compiled.create_infer_request()
        self._turn = threading.Lock()
        self.is_isolated = is_uniform = graph == UNIFORM_GRAPH
        self._planner: Planner[SlotLaunch] | Planner[Launch] = (
            SlotPlanner((), Costs(self.config, masked=False))
            if is_uniform
            else LaunchPlanner((), Costs(self.config, masked=True))
        )
        memory = LaunchMemory(
            config=self.config, way="uniform" if is_uniform else "dense", fused=True
        )
        self.guard = MemoryGuard(memory, host_available_bytes)
        self.info = BackendInfo(
            runtime="openvino",
            version=openvino.__version__.partition("-")[0],
            precision=precision,
            weights_sha256=manifest.record_of(DATA).sha256,
            model=str(directory),
            graph=graph,
            splitting=self._planner.splitting,
            cpu=device,
            threads=int(compiled.get_property("INFERENCE_NUM_THREADS")),
        )

    @classmethod
    def open(cls, path: Path, options: BackendOptions) -> OpenVinoBackend:
        """See `Backend.open`."""
        return cls(path, options)

    def run(self, batch: PackedBatch) -> npt.NDArray[np.floating]:
        """See `Backend.run`."""
        self._weights.refuse_changed()
        layouts = self._planner.layouts(batch.grid)
        with self.guard.watched(batch.grid, layouts):
            return run_layouts(layouts, batch, self._launch)

    def _launch(
        self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        with self._turn:
            if self._request is None:
                raise BackendError("the encoder is closed")
            try:
                # The inputs are read in place.
                results = self._request.infer([pixel_values, grid_thw], share_inputs=True)
            except Exception as error:  # OpenVINO's exceptions have no common base
                raise BackendError(f"OpenVINO failed: {error}") from error
            image_embeds: npt.NDArray[np.floating] = results[0]
            return image_embeds

    def close(self) -> None:
        """See `Backend.close`. Waits for the launch that is running."""
        with self._turn:
            self._request = None


def _graph_of(directory: Path, manifest: Manifest) -> str:
    """The file of a model directory that OpenVINO runs: the newest flavour that is there."""
    if manifest.precision != "fp32":
        raise BackendError(
            f"openvino runs float32 models, {directory} is {manifest.precision}",
            hint="export with --fp32; bf16 is then a precision of the backend",
        )
    for graph in (UNIFORM_GRAPH, OPENVINO_GRAPH):
        if graph in manifest.files:
            return graph
    raise ManifestError(
        f"{directory} has neither {UNIFORM_GRAPH} nor {OPENVINO_GRAPH}: an earlier version exported it",
        hint="export it again, or choose --backend onnxruntime-cpu",
    )
