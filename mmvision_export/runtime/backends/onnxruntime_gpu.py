"""ONNX Runtime on a GPU: the CUDA and TensorRT providers, and NVIDIA's plugin for TensorRT-RTX.

None of them has run on the machines this project is developed on, which have no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.preprocessing import preprocessor_of
from mmvision_export.artifacts.profile import DEFAULT_PROFILE, Profile, checked_profile
from mmvision_export.core.errors import BackendError, EngineError
from mmvision_export.core.install import install_command
from mmvision_export.core.user_folders import cache_folder, private_folder
from mmvision_export.models.minimax_m3_vl.costs import Costs
from mmvision_export.runtime.backends.backend import BackendOptions
from mmvision_export.runtime.backends.onnxruntime import (
    PROVIDERS,
    OnnxRuntimeBackend,
    create_session,
    session_options,
)
from mmvision_export.runtime.launch_planner import LaunchPlanner

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CudaBackend", "RtxBackend", "TensorRTProviderBackend", "rtx_devices"]

_RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


class CudaBackend(OnnxRuntimeBackend):
    """ONNX Runtime's CUDA provider: kernel by kernel, nothing to build."""

    name = "onnxruntime-cuda"


class TensorRTProviderBackend(OnnxRuntimeBackend):
    """ONNX Runtime's TensorRT provider: builds an engine when it is opened first, and keeps it.

    Without a profile it would build the engine anew for each size beyond those it has met. With one it takes
    no size beyond, so that a batch is cut.

    References:
        https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html has the options;
        the comment on profiles in `tensorrt_execution_provider.cc` ("Initialize shape range for each dynamic
        shape input tensor") what becomes of the shapes: "It won't make adjustment for profile values during
        EP compute time."
    """

    name = "onnxruntime-tensorrt"

    def _new_planner(
        self, directory: Path, manifest: Manifest, options: BackendOptions
    ) -> LaunchPlanner | None:
        default, per_token = DEFAULT_PROFILE, self.config.patches_per_token
        largest_image = preprocessor_of(directory, manifest).most_patches
        max_patches = options.max_patches or max(default.max_patches, largest_image)
        max_tokens = max_patches // per_token
        try:
            profile = dataclasses.replace(
                default,
                opt_patches=min(default.opt_patches, max_tokens * per_token),
                max_patches=max_patches,
                max_images=options.max_images or min(default.max_images, max_tokens),
            )
            self.profiles = (checked_profile(profile, self.config),)
        except EngineError as error:
            raise BackendError(str(error), hint=error.hint) from error
        return LaunchPlanner(self.profiles, Costs(self.config, masked=True))

    def _new_session(self, graph: Path, options: BackendOptions) -> onnxruntime.InferenceSession:
        (profile,) = self.profiles
        cache = _cache_of(self.name, graph)
        caching = (
            {}
            if cache is None
            else {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(cache),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(cache),
            }
        )
        return create_session(
            graph,
            provider=PROVIDERS[self.name],
            device=options.device,
            provider_options={**caching, **_shape_options(profile, self.config.patch_dim)},
            behind=[PROVIDERS["onnxruntime-cuda"]],
        )


def _cache_of(backend: str, graph: Path) -> Path | None:
    """Where a provider keeps what it compiled of a graph; None for a user without a home folder.

    It is executable content, and the providers load whatever lies there: so it is in the user's own
    folder. The manifest's hashes, which were just verified, tell directories apart.
    """
    folder = cache_folder()
    if folder is None:
        return None
    files = Manifest.read(graph.parent).files
    hashes = "".join(files[name].sha256 for name in sorted(files) if name.startswith(graph.name))
    cache = folder / backend / hashlib.sha256(hashes.encode()).hexdigest()[:32]
    try:
        return private_folder(cache)
    except OSError:
        return None


def _shape_options(profile: Profile, patch_dim: int) -> dict[str, str]:
    """The provider's options for a profile, with every input in each: `pixel_values:4x1176,grid_thw:1x3`."""
    shapes = profile.input_shapes(patch_dim)
    return {
        f"trt_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, of_input[index]))}" for name, of_input in shapes.items()
        )
        for index, kind in enumerate(("min", "opt", "max"))
    }


class RtxBackend(OnnxRuntimeBackend):
    """NVIDIA's TensorRT-RTX provider, a plugin of its own package: compiles the graph in seconds where it runs.

    See https://nvidia.github.io/TensorRT-RTX-EP-ABI/ for the options.
    """

    name = "onnxruntime-rtx"

    def _new_session(self, graph: Path, options: BackendOptions) -> onnxruntime.InferenceSession:
        devices = rtx_devices()
        if options.device >= len(devices):
            raise BackendError(
                f"there is no TensorRT-RTX device {options.device}: this machine has {len(devices)}"
            )
        import onnxruntime

        cache = options.runtime_cache or _cache_of(self.name, graph)
        session = session_options()
        session.add_provider_for_devices(
            [devices[options.device]],
            {} if cache is None else {"nv_runtime_cache_path": str(cache)},
        )
        try:
            return onnxruntime.InferenceSession(str(graph), session)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(
                f"ONNX Runtime cannot load {graph} with TensorRT-RTX: {error}"
            ) from error


def rtx_devices() -> list[Any]:
    """The devices that the TensorRT-RTX plugin offers ONNX Runtime, after registering it if it was not.

    Raises:
        BackendError: ONNX Runtime or the plugin is not installed, it cannot be loaded, or it offers none.
    """
    hint = install_command("gpu-rtx")
    try:
        import onnxruntime

        plugin = importlib.import_module(_RTX_PACKAGE)
    except ImportError as error:
        raise BackendError(f"{_RTX_PACKAGE} is not installed: {error}", hint=hint) from error
    name = plugin.get_ep_name()

    def offered() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]

    if not (devices := offered()):
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # also where it is registered already, and found no device
            raise BackendError(
                f"the TensorRT-RTX plugin of ONNX Runtime offers no device: {error}"
            ) from error
        devices = offered()
    if not devices:
        raise BackendError(
            "the TensorRT-RTX plugin of ONNX Runtime offers no device: is there an RTX GPU and a driver?"
        )
    return devices
