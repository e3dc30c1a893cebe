"""ONNX Runtime: what its providers share, and the CPU's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.graph_variants import (
    VNNI_GRAPH,
    data_of,
    original_of,
    variant_for_this_cpu,
)
from mmvision_export.artifacts.manifest import CPU_GRAPH, DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.install import install_command
from mmvision_export.core.processor import cpu_has_vnni
from mmvision_export.core.verified_files import verify_file
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.available_memory import (
    device_available_bytes_or_none,
    host_available_bytes,
)
from mmvision_export.runtime.backends.backend import BackendInfo, BackendOptions
from mmvision_export.runtime.launch_planner import LaunchPlanner
from mmvision_export.runtime.mapped_weights import MappedWeights
from mmvision_export.runtime.memory_guard import MemoryGuard
from mmvision_export.runtime.planner import LaunchLayout, run_layouts, whole_layout

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "PROVIDERS",
    "CpuBackend",
    "OnnxRuntimeBackend",
    "create_session",
    "require_provider",
    "session_options",
]

_ERRORS_ONLY = 3  # ONNX Runtime's severity; its warnings are about its own constant folding
PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-amx": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeBackend:
    """The graph of a model directory in ONNX Runtime; a subclass says with which provider. See `Backend`.

    Raises:
        ManifestError: Files of the directory are missing or not those of its manifest.
        BackendError: ONNX Runtime is not installed, lacks the provider, or cannot load the graph.
    """

    name: str
    profiles: Sequence[Profile] = ()

    @classmethod
    def open(cls, path: Path, options: BackendOptions) -> OnnxRuntimeBackend:
        """See `Backend.open`."""
        return cls(path, options)

    def __init__(self, directory: Path, options: BackendOptions) -> None:
        manifest = Manifest.read(directory)
        graph = (
            self._graph_name(manifest)
            if options.flavour is None
            else self._flavour_graph(manifest, options.flavour)
        )
        if graph not in manifest.files:
            raise ManifestError(
                f"{directory} has no {graph}", hint="make flavours with: mmvision quantize"
            )
        # The graph is small and hashed at each opening, the weights once.
        manifest.verify(directory, dict.fromkeys((GRAPH, graph)))
        weights = {DATA, data_of(graph)} & set(manifest.files)
        self._weights = MappedWeights(directory / data for data in weights)
        for data in weights:
            verify_file(
                manifest.record_of(data),
                manifest.path_of(directory, data),
                said_by="the manifest",
                when=options.verify,
                progress=options.progress,
            )
        # Of a quantised flavour the manifest says which graph it was made from: before it did, from the portable one.
        source = manifest.quantization.get(original_of(graph), {}).get("source", graph)
        self._masked = source != CPU_GRAPH
        self.is_isolated = not self._masked
        self.config = manifest.config
        self._planner = self._new_planner(directory, manifest, options)
        self.largest_image = None if self._planner is None else self._planner.largest_image
        self._session: onnxruntime.InferenceSession | None = self._new_session(
            directory / graph, options
        )
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[self._session.get_inputs()[0].type])
        self.guard = self._new_guard(options)
        import onnxruntime

        self.info = BackendInfo(
            runtime="onnxruntime",
            version=onnxruntime.__version__,
            precision=options.flavour or manifest.precision,
            weights_sha256=manifest.record_of(DATA).sha256,
            model=str(directory),
            graph=graph,
            splitting=None if self._planner is None else self._planner.splitting,
        )

    def _graph_name(self, manifest: Manifest) -> str:
        """The file of a model directory that this backend runs: the one place where a backend chooses a flavour."""
        return GRAPH

    def _flavour_graph(self, manifest: Manifest, flavour: str) -> str:
        """The file of a flavour that was asked for."""
        return flavour_graph(flavour)

    def _new_planner(
        self, directory: Path, manifest: Manifest, options: BackendOptions
    ) -> LaunchPlanner | None:
        """What cuts batches into launches; None where a batch is one launch."""
        return None

    def _new_guard(self, options: BackendOptions) -> MemoryGuard:
        """What refuses launches beyond the memory.

        On a GPU attention is taken to be fused: whether it is has not been measured.
        """
        memory = LaunchMemory(
            config=self.config, way="dense", itemsize=self.dtype.itemsize, fused=True
        )
        return MemoryGuard(memory, lambda: device_available_bytes_or_none(options.device), "device")

    def _new_session(self, graph: Path, options: BackendOptions) -> onnxruntime.InferenceSession:
        return create_session(
            graph, provider=PROVIDERS[self.name], device=options.device, threads=options.threads
        )

    def run(self, batch: PackedBatch) -> npt.NDArray[np.floating]:
        """See `Backend.run`."""
        self._weights.refuse_changed()
        if self._planner is None:
            layouts: Sequence[LaunchLayout] = [whole_layout(batch.grid)]
        else:
            layouts = self._planner.layouts(batch.grid)
        with self.guard.watched(batch.grid, layouts):
            return run_layouts(layouts, batch, self._launch)

    def _launch(
        self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        if self._session is None:
            raise BackendError("the encoder is closed")
        feeds = {"pixel_values": pixel_values, "grid_thw": grid_thw}
        try:
            (image_embeds,) = self._session.run(None, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        result: npt.NDArray[np.floating] = image_embeds
        return result

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


class CpuBackend(OnnxRuntimeBackend):
    """ONNX Runtime's CPU provider, on every machine, with the CPU flavour of the graph."""

    name = "onnxruntime-cpu"

    def _new_planner(
        self, directory: Path, manifest: Manifest, options: BackendOptions
    ) -> LaunchPlanner | None:
        if not self._masked:
            return None
        # The work and memory of masked attention grow with the square of a launch, so that a batch is cut.
        return LaunchPlanner(self.profiles, Costs(self.config, masked=True))

    def _new_guard(self, options: BackendOptions) -> MemoryGuard:
        # Operators that the CPU provider has in float32 only get a copy of float16 activations.
        itemsize = 4 if self.dtype == np.float32 else 2 + 4
        memory = LaunchMemory(
            config=self.config, way="dense" if self._masked else "blocked", itemsize=itemsize
        )
        return MemoryGuard(memory, host_available_bytes)

    def _graph_name(self, manifest: Manifest) -> str:
        if manifest.precision == "bf16":
            raise BackendError(
                "this is a bf16 model, and ONNX Runtime's CPU provider has no bf16 operators",
                hint="export with --fp32 or --fp16 to run it here",
            )
        return CPU_GRAPH if CPU_GRAPH in manifest.files else GRAPH

    def _flavour_graph(self, manifest: Manifest, flavour: str) -> str:
        graph = variant_for_this_cpu(flavour_graph(flavour), manifest.files)
        if graph == VNNI_GRAPH and not cpu_has_vnni():
            raise BackendError(
                f"this CPU has no VNNI, without which the sums of {VNNI_GRAPH} saturate",
                hint="choose --flavour cpu-int8, which every CPU computes exactly",
            )
        return graph


def require_provider(provider: str) -> None:
    """Raise `BackendError` unless ONNX Runtime is installed and built with this provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime is not installed: {error}", hint=f"{install_command('cpu')} (or [gpu])"
        ) from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendError(
            f"this ONNX Runtime has no {provider}, only {', '.join(available)}",
            hint=None if provider.startswith("CPU") else install_command("gpu"),
        )


def create_session(
    graph: Path | bytes,
    *,
    provider: str,
    device: int = 0,
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    behind: Sequence[str] = (),
    weights_in: Path | None = None,
    entries: Mapping[str, str] | None = None,
    operators: Path | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on exactly the provider asked for.

    Args:
        graph: The `.onnx` file, or a model in memory.
        provider: Its name.
        device: CUDA device, of all but the CPU provider.
        threads: Threads of the CPU provider; its own choice if None.
        provider_options: More of the provider's options.
        behind: Providers for the operators that this one does not take.
        weights_in: Folder of the weights of a model in memory.
        entries: More of the session's configuration.
        operators: Library of operators for nodes of the graph; the caller has verified it.

    Raises:
        BackendError: ONNX Runtime is not installed, has no such provider, cannot use it, or cannot load the graph.
    """
    require_provider(provider)
    import onnxruntime

    options = session_options(threads)
    if provider.startswith("CPU"):
        # A pattern is planned for each shape that comes, and kept: twice the memory, and no faster.
        options.enable_mem_pattern = False
    if weights_in is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights_in.resolve())
        )
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if operators is not None:
        try:
            options.register_custom_ops_library(str(operators.resolve()))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime cannot use {operators}: {error}") from error
    source, name = (str(graph), str(graph)) if isinstance(graph, Path) else (graph, "the graph")
    place = {} if provider.startswith("CPU") else {"device_id": str(device)}
    providers = [
        (provider, {**place, **(provider_options or {})}),
        *((other, place) for other in behind),
    ]
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BackendError(f"ONNX Runtime cannot load {name}: {error}") from error
    # A provider that cannot start is replaced by the CPU's with no more than a logged warning.
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"ONNX Runtime could not start {provider} on device {device}",
            hint="see: mmvision doctor",
        )
    return session


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """What every session is opened with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # x86 processors without VNNI add two products of uint8 and int8 in 16 bits, which saturates: have ONNX Runtime
    # store int8 weights as uint8 there, whose kernel does not. With VNNI it would store them so too, for nothing.
    if not cpu_has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
