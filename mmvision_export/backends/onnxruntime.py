"""ONNX Runtime on a CPU or a CUDA GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmvision_export.backends import BackendName
from mmvision_export.errors import BackendError, ManifestError
from mmvision_export.grid import groups_of_images
from mmvision_export.manifest import DATA, GRAPH, Manifest, flavour_graph
from mmvision_export.sidecar import Profile

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PROVIDERS", "OnnxRuntimeBackend", "create_session", "require_provider"]

_ERRORS_ONLY = 3  # ONNX Runtime's severity; its warnings are about its own constant folding
PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
# On a CPU the images of a batch are run in groups of at most this many patches. The portable graph's attention is
# masked, so that its work and memory grow with the square of what it is given at once: at full size it is a tenth of
# all work at 1024 patches, and two thirds at 20,000 (sixteen photographs), where the scores alone take 27 GB.
_CPU_GROUP_PATCHES = 1024
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeBackend:
    """The portable graph of a model directory in ONNX Runtime. See `Backend`.

    Raises:
        ManifestError: Files of the directory are missing or not those of its manifest.
        BackendError: ONNX Runtime is not installed, lacks the provider, or cannot load the graph.
    """

    profile: Profile | None = None

    def __init__(
        self, directory: Path, *, name: str, device: int = 0, threads: int | None = None, flavour: str | None = None
    ) -> None:
        manifest = Manifest.read(directory)
        graph = GRAPH if flavour is None else flavour_graph(flavour)
        if graph not in manifest.files:
            raise ManifestError(f"{directory} has no {graph}", hint="make flavours with: mmvision quantize")
        # The graph is small and hashed in full. Of the weights only the size is compared: hashing gigabytes would take
        # longer than everything else here, and `mmvision inspect` does it.
        manifest.verify(directory, [graph])
        for data in {DATA, f"{graph}.data"} & set(manifest.files):
            manifest.record_of(data).verify_size(directory / data, said_by="the manifest")
        if manifest.precision == "bf16" and name == "onnxruntime-cpu":
            raise BackendError(
                f"{directory} is a bf16 model, and ONNX Runtime's CPU provider has no bf16 operators",
                hint="export with --fp32 or --fp16 to run it here",
            )
        self._session: onnxruntime.InferenceSession | None = create_session(
            directory / graph, provider=PROVIDERS[name], device=device, threads=threads
        )
        self.name: BackendName = "onnxruntime-cuda" if name == "onnxruntime-cuda" else "onnxruntime-cpu"
        self.config = manifest.config
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[self._session.get_inputs()[0].type])
        import onnxruntime

        self.info: dict[str, Any] = {
            "model": str(directory),
            "graph": graph,
            "precision": manifest.precision,
            "onnxruntime": onnxruntime.__version__,
        }

    def run(self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """See `Backend.run`."""
        if self.name == "onnxruntime-cuda":
            return self._run(pixel_values, grid_thw)
        bounds = np.cumsum([0, *grid_thw.prod(axis=1)])
        groups = groups_of_images(grid_thw, _CPU_GROUP_PATCHES)
        return np.concatenate([self._run(pixel_values[bounds[g.start] : bounds[g.stop]], grid_thw[g]) for g in groups])

    def _run(self, pixel_values: npt.NDArray[np.floating], grid_thw: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        if self._session is None:
            raise BackendError("the encoder is closed")
        try:
            (image_embeds,) = self._session.run(None, {"pixel_values": pixel_values, "grid_thw": grid_thw})
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        result: npt.NDArray[np.floating] = image_embeds
        return result

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


def require_provider(provider: str) -> None:
    """Raise `BackendError` unless ONNX Runtime is installed and built with this provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is not installed: {error}", hint="pip install '.[cpu]' (or [gpu])") from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendError(
            f"this ONNX Runtime has no {provider}, only {', '.join(available)}",
            hint="pip install '.[gpu]'" if "CUDA" in provider else None,
        )


def create_session(
    graph: Path, *, provider: str, device: int = 0, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on exactly the provider asked for.

    Raises:
        BackendError: ONNX Runtime is not installed, has no such provider, cannot use it, or cannot load the graph.
    """
    require_provider(provider)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # x86 processors without VNNI add two products of uint8 and int8 in 16 bits, which saturates: have ONNX Runtime
    # store int8 weights as uint8 there, whose kernel does not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    provider_options: dict[str, str] = {"device_id": str(device)} if "CUDA" in provider else {}
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=[(provider, provider_options)])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
    # A provider that cannot start is replaced by the CPU's with no more than a logged warning.
    if session.get_providers()[0] != provider:
        raise BackendError(f"ONNX Runtime could not start {provider} on device {device}", hint="see: mmvision doctor")
    return session
