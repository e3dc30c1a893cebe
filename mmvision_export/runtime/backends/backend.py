"""What a backend is: one runtime with a model loaded into it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError
from mmvision_export.core.progress import Progress
from mmvision_export.core.verified_files import VERIFY, Verify
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.memory_guard import MemoryGuard

__all__ = ["Backend", "BackendInfo", "BackendOptions", "DeviceBackend", "WeightBudget"]

WeightBudget = int | Literal["auto"]
"""Device memory for the weights of an engine that streams them: bytes, or what TensorRT proposes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How a model is opened; each backend uses what concerns it.

    Attributes:
        backend: A name of `BACKENDS`, or `auto` for the first that works here.
        device: CUDA device.
        threads: Threads of the CPU backend; its own choice if None.
        streams: Calls that a TensorRT engine runs at once; more wait. Each has a stream and
            activations of its own, weights are shared. ONNX Runtime takes calls of any number of
            threads.
        cuda_graphs: Whether a TensorRT engine with buckets is run by one CUDA graph for each
            bucket.
        capture_on_open: Whether those are captured when it is opened, rather than in the first call
            of each bucket.
        kernels: When TensorRT-RTX specialises kernels to a shape: `lazy`, `eager` or `none`.
            Default: eager for an engine with buckets, else lazy.
        runtime_cache: Where TensorRT-RTX keeps compiled kernels: a file for `tensorrt-rtx`, and a
            folder for `onnxruntime-rtx`; by default in the user's own cache.
        flavour: Which graph of the directory a CPU backend runs, as `cpu-int8`; the best exact one
            if None.
        kernel_library: For `onnxruntime-amx`: what `mmvision build-plugins --cpu` built, by default
            the one in the model directory's own `plugins/`. Executable content, as an engine is.
        max_patches: For `onnxruntime-tensorrt`: most patches of a launch. By default 4096, or the
            largest image of the model directory's preprocessing if that has more. Its engine is
            built once for all sizes up to it; memory for masked attention grows with its square.
        max_images: For `onnxruntime-tensorrt`: most images of a launch, 64 by default.
        weight_budget: Of an engine built with `--weight-streaming`: most device memory for the weights
            that can be streamed, in bytes, or `auto` for what TensorRT proposes. The rest stays in the
            host's memory. None keeps all of them on the device.
        precision: What `openvino` computes in: `fp32`, its default, or `bf16` where the CPU has it.
        trust: Whether engines and libraries are loaded that this user has not built here: they are
            executable content (see `core.trust`). If None, one that is named is, and those that
            lie in a directory are not.
        verify: When the weights are hashed: the first time this user opens them, `always`, or
            `never`.
        progress: Told about what takes long while opening.
        refuse_non_finite: Whether embeddings that are not finite are an error; parity measures
            them.

    Raises:
        BackendError: A number is out of range.
    """

    backend: str = "auto"
    device: int = 0
    threads: int | None = None
    streams: int = 1
    cuda_graphs: bool = True
    capture_on_open: bool = False
    kernels: Any = None
    runtime_cache: str | Path | None = None
    flavour: str | None = None
    kernel_library: str | Path | None = None
    max_patches: int | None = None
    max_images: int | None = None
    weight_budget: WeightBudget | None = None
    precision: str | None = None
    trust: bool | None = None
    verify: Verify = "once"
    progress: Progress | None = None
    refuse_non_finite: bool = True

    def __post_init__(self) -> None:
        for name in ("threads", "streams", "max_patches", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BackendError(f"{name} must be at least 1, got {value}")
        if self.threads is not None and self.threads > (most := _most_threads()):
            raise BackendError(f"threads must be at most {most}, got {self.threads}")
        budget = self.weight_budget
        if budget not in (None, "auto") and (not isinstance(budget, int) or budget < 0):
            raise BackendError(f"weight_budget must be 'auto' or bytes from 0 on, got {budget!r}")
        if self.verify not in VERIFY:
            raise BackendError(f"verify must be one of {', '.join(VERIFY)}, got {self.verify!r}")


def _most_threads() -> int:
    """More threads than these only wait for each other, and thousands never begin to work."""
    return max(4 * (os.cpu_count() or 1), 16)


@dataclasses.dataclass(kw_only=True)
class BackendInfo:
    """Facts about what runs. None where a fact is not of this backend.

    Attributes:
        runtime: Package that runs the model, as `onnxruntime` or `tensorrt`.
        version: Its version.
        precision: Of the graph or engine; of OpenVINO, what it computes in.
        weights_sha256: Of the file of weights; of an engine, of those that are in it.
        model: The model directory.
        graph: File name of the graph.
        engine: The engine file.
        attention: How the engine does attention.
        splitting: How batches are cut.
        compute_capability: Of the GPU.
        cuda_graphs: Whether buckets are run by CUDA graphs.
        captures_refused: Buckets that could not be captured and run without a graph, and why.
        profiles: Accepted sizes, for people.
        streams: Calls at once.
        refitted: Whether the engine got its weights from the model directory when it was opened.
        streamable_weight_bytes: Weights of the engine that need not be on the device.
        resident_weight_bytes: Those of them that are.
        plugin_library: Name of the library beside the engine.
        kernels: TensorRT-RTX's kernel strategy.
        runtime_cache: TensorRT-RTX's file, and whether it was read.
        kernel_library: The library of operators for ONNX Runtime.
        cpu: Which CPU, in OpenVINO's words.
        threads: Of OpenVINO's pool.
        chosen: Why `auto` took this backend.
        passed_over: What `auto` did not take, and why.
    """

    runtime: str
    version: str
    precision: str
    weights_sha256: str
    model: str | None = None
    graph: str | None = None
    engine: str | None = None
    attention: str | None = None
    splitting: str | None = None
    compute_capability: str | None = None
    cuda_graphs: bool | None = None
    captures_refused: dict[str, str] | None = None
    profiles: list[str] | None = None
    streams: int | None = None
    refitted: bool | None = None
    streamable_weight_bytes: int | None = None
    resident_weight_bytes: int | None = None
    plugin_library: str | None = None
    kernels: str | None = None
    runtime_cache: str | None = None
    kernel_library: str | None = None
    cpu: str | None = None
    threads: int | None = None
    chosen: str | None = None
    passed_over: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is known, the version under the runtime's name."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return {known.pop("runtime"): known.pop("version"), **known}


class Backend(Protocol):
    """A model loaded into one runtime. Safe for use by several threads.

    Attributes:
        name: In the registry.
        config: The encoder's dimensions.
        dtype: Float type of `pixel_values` and `image_embeds`.
        profiles: Sizes of one launch, empty for any. A batch may have any number of images; each
            must fit one.
        largest_image: Most patches of one image, or None for any number.
        guard: Refuses launches that need more memory than there is; None where a backend has held
            all that a launch needs since it was opened.
        is_isolated: Whether no image can reach another of its launch, as it can where attention is
            masked: there one that overflows spoils the others.
        info: What runs.
    """

    name: str
    config: EncoderConfig
    dtype: np.dtype[Any]
    profiles: Sequence[Profile]
    largest_image: int | None
    guard: MemoryGuard | None
    is_isolated: bool
    info: BackendInfo

    @classmethod
    def open(cls, path: Path, options: BackendOptions) -> Backend:
        """Load a model directory or an engine file.

        Raises:
            BackendError: The runtime is not installed, or does not work here.
            ManifestError: The files are missing, damaged, or not for this machine.
        """

    def run(self, batch: PackedBatch) -> npt.NDArray[np.floating]:
        """Run a batch in host memory whose patches are in `dtype`.

        Returns:
            `[num_image_tokens, text_hidden_size]` in `dtype`, a new array.

        Raises:
            InputError: An image does not fit, or no cut of the batch does.
            BackendError: The runtime failed.
        """

    def close(self) -> None:
        """Free what is held. The backend cannot be used afterwards."""


@runtime_checkable
class DeviceBackend(Protocol):
    """A backend that reads and writes device memory, and runs in a stream of the caller's.

    Attributes:
        device: Index of its CUDA device.
    """

    device: int

    def run_into(
        self,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        batch: PackedBatch,
        *,
        stream: int | None,
    ) -> None:
        """As `Backend.run`, filling an array.

        Args:
            image_embeds: `[num_image_tokens, text_hidden_size]` in `dtype`, filled.
            batch: In host memory, or with a `DeviceArray` for its patches.
            stream: Handle of a CUDA stream, or None for one of the backend's own. With one, and an
                array on the device to fill, it returns once the work is in the stream.
        """
