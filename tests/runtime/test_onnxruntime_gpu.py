"""ONNX Runtime's GPU providers, as far as that goes without a GPU.

What they are opened with, and what they refuse.
"""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.preprocessing import preprocessor_of
from mmvision_export.core.errors import BackendError, InputError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.install import install_command
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, checked_batch
from mmvision_export.models.minimax_m3_vl.preprocessor_config import PREPROCESSOR
from mmvision_export.runtime.backends import AUTO_BACKENDS, Backend, BackendOptions, open_backend
from mmvision_export.runtime.backends.onnxruntime import create_session
from tests.support.configs import copy_of
from tests.support.errors import refused

NAME = "NvTensorRTRTXExecutionProvider"


def cache_of(backend: str) -> str:
    """Where this user's compiled kernels of a backend are."""
    return str(Path(os.environ["XDG_CACHE_HOME"]) / "mmvision-export" / backend)


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_provider_that_is_not_built_in(exported: Path, backend: str) -> None:
    if {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[backend] in str(
        onnxruntime.get_available_providers()
    ):
        pytest.skip("this ONNX Runtime has it")
    provider = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[backend]
    with refused(BackendError, f"{provider}ExecutionProvider") as caught:
        open_backend(exported, BackendOptions(backend=backend))
    assert caught.value.hint == install_command("gpu")


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_what_sessions_are_opened_with(
    exported: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the provider: the session is the CPU's, under the other's name."""
    opened: list[Any] = []
    whole = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: Any) -> Any:
        opened.extend(providers)
        real = whole(path, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(real, "get_providers", lambda: [providers[0][0]])
        return real

    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with_device = BackendOptions(backend=backend, device=1)
    open_backend(exported, with_device).close()
    assert opened[0][1]["device_id"] == "1"
    if backend == "onnxruntime-tensorrt":
        assert [name for name, _ in opened] == every[:2]
        # In the user's own folder, whatever the model directory brings along.
        assert cache_of(backend) in opened[0][1]["trt_engine_cache_path"]
        assert opened[0][1]["trt_engine_cache_path"] == opened[0][1]["trt_timing_cache_path"]
        monkeypatch.setattr(
            "mmvision_export.runtime.backends.onnxruntime_gpu.cache_folder", lambda: None
        )
        opened.clear()
        open_backend(exported, with_device).close()
        assert not any("cache" in name for name in opened[0][1])


class TensorRTProvider:
    """A stand-in for ONNX Runtime's TensorRT provider: takes the sizes of its profile, and computes on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: dict[str, str] = {}
        self.ran: list[dict[str, tuple[int, ...]]] = []
        self._whole = onnxruntime.InferenceSession
        every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: every)
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.session)

    def session(self, path: str, options: Any, providers: Any) -> Any:
        self.options = providers[0][1]
        self._real = self._whole(path, options, providers=["CPUExecutionProvider"])
        return types.SimpleNamespace(
            get_providers=lambda: [providers[0][0]], get_inputs=self._real.get_inputs, run=self.run
        )

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        inputs = (each.split(":") for each in self.options[f"trt_profile_{kind}_shapes"].split(","))
        return {name: tuple(map(int, shape.split("x"))) for name, shape in inputs}

    def run(self, names: Any, feeds: dict[str, Any]) -> Any:
        least, most = self.shapes("min"), self.shapes("max")
        self.ran.append({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            for low, size, high in zip(least[name], array.shape, most[name], strict=True):
                assert low <= size <= high, f"{name} is outside the profile"
        return self._real.run(names, feeds)


def test_the_tensorrt_provider_has_a_profile_of_every_input(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TensorRTProvider(monkeypatch)
    backend = open_backend(exported, BackendOptions(backend="onnxruntime-tensorrt"))
    (profile,) = backend.profiles
    assert (profile.max_patches, profile.max_images) == (4096, 64)
    found = {key: value for key, value in provider.options.items() if "profile" in key}
    assert found == {
        "trt_profile_min_shapes": "pixel_values:4x1176,grid_thw:1x3",
        "trt_profile_opt_shapes": "pixel_values:1024x1176,grid_thw:4x3",
        "trt_profile_max_shapes": "pixel_values:4096x1176,grid_thw:64x3",
    }
    inputs = {each.name for each in provider._real.get_inputs()}
    assert all(set(provider.shapes(kind)) == inputs for kind in ("min", "opt", "max"))
    open_backend(
        exported, BackendOptions(backend="onnxruntime-tensorrt", max_patches=256, max_images=2)
    ).close()
    assert provider.shapes("opt") == {"pixel_values": (256, 1176), "grid_thw": (2, 3)}
    assert provider.shapes("max") == {"pixel_values": (256, 1176), "grid_thw": (2, 3)}


def test_the_profile_has_room_for_the_largest_image_of_the_preprocessing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    manifest = Manifest.read(directory)
    preprocessor = preprocessor_of(directory, manifest).by("long-side")
    content = json.dumps(preprocessor.to_dict()).encode()
    (directory / PREPROCESSOR).write_bytes(content)
    manifest.files[PREPROCESSOR] = FileRecord.of(content)
    manifest.write(directory)
    TensorRTProvider(monkeypatch)
    backend = open_backend(directory, BackendOptions(backend="onnxruntime-tensorrt"))
    assert backend.profiles[0].max_patches == 20_736


def test_no_launch_is_outside_the_profile(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_backend(exported, BackendOptions(backend="onnxruntime-cpu"))
    provider = TensorRTProvider(monkeypatch)
    limits: dict[str, Any] = {"max_patches": 256, "max_images": 2}
    backend = open_backend(exported, BackendOptions(backend="onnxruntime-tensorrt", **limits))
    rows = [(1, 8, 8), (1, 4, 4), (1, 2, 2), (1, 16, 16), (1, 12, 8)]
    batch = batch_of(rows, backend)
    embeds = backend.run(batch)
    assert len(provider.ran) > 2
    np.testing.assert_allclose(embeds, whole.run(batch), rtol=0, atol=1e-5)
    # The control: the stand-in does refuse what is outside.
    with pytest.raises(BackendError, match="outside the profile"):
        backend._launch(batch.pixel_values, batch.grid.rows)  # type: ignore[attr-defined]
    with pytest.raises(InputError) as caught:
        backend.run(batch_of([(1, 18, 16)], backend))
    assert "max_patches" in str(caught.value.hint)


def batch_of(rows: list[tuple[int, int, int]], backend: Backend) -> PackedBatch:
    """Random patches in a grid."""
    count = sum(t * h * w for t, h, w in rows)
    patches = np.random.default_rng(0).standard_normal((count, 1176)).astype(np.float32)
    return checked_batch(patches, np.array(rows), backend.config, np.float32)


def test_limits_that_cannot_be() -> None:
    with refused(BackendError, "max_patches", 1, 0):
        BackendOptions(max_patches=0)


def test_limits_that_do_not_fit_the_encoder(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRTProvider(monkeypatch)
    backend = open_backend(exported, BackendOptions(backend="onnxruntime-tensorrt", max_patches=16))
    assert backend.profiles[0].max_images == 4  # there is room for no more
    for max_patches, max_images, facts in (
        (254, None, ("max_patches", 4, 254)),
        (16, 5, ("max_images", 4, 5)),
    ):
        with refused(BackendError, *facts):
            open_backend(
                exported,
                BackendOptions(
                    backend="onnxruntime-tensorrt", max_patches=max_patches, max_images=max_images
                ),
            )
    with refused(BackendError, "onnxruntime-cpu"):
        open_backend(exported, BackendOptions(backend="onnxruntime-cpu", max_patches=256))


def test_a_provider_that_does_not_start_is_an_error(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself would go on with the CPU's."""
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    whole = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda p, o, providers: whole(p, o, providers=["CPUExecutionProvider"]),
    )
    with refused(BackendError, "CUDAExecutionProvider", "device 0"):
        create_session(exported / "model.onnx", provider="CUDAExecutionProvider")


class Plugin(types.ModuleType):
    """A stand-in for NVIDIA's plugin package, with so many devices once it is registered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
        super().__init__("onnxruntime_ep_nv_tensorrt_rtx")
        self.registered = 0
        self.cached: list[dict[str, str]] = []
        device = types.SimpleNamespace(ep_name=NAME)
        monkeypatch.setitem(__import__("sys").modules, self.__name__, self)
        monkeypatch.setattr(
            onnxruntime, "get_ep_devices", lambda: [device] * devices * self.registered
        )
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self.register)

        class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
            def add_provider_for_devices(
                options, devices: list[Any], settings: dict[str, str]
            ) -> None:
                self.cached.append(settings)

        monkeypatch.setattr(onnxruntime, "SessionOptions", Options)

    def register(self, name: str, path: str) -> None:
        if path == "broken" or self.registered:
            raise RuntimeError(f"cannot load {path}")
        self.registered = 1

    def get_ep_name(self) -> str:
        return NAME

    def get_library_path(self) -> str:
        return "plugin.so"


def test_the_rtx_plugin(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin(monkeypatch, devices=1)
    for _ in range(2):  # registered once in a process
        open_backend(exported, BackendOptions(backend="onnxruntime-rtx")).close()
    assert plugin.registered == 1
    first, second = (options["nv_runtime_cache_path"] for options in plugin.cached)
    assert cache_of("onnxruntime-rtx") in first
    assert first == second
    with refused(BackendError, "device 1", "has 1"):
        open_backend(exported, BackendOptions(backend="onnxruntime-rtx", device=1))


def test_the_rtx_plugin_without_a_gpu(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plugin(monkeypatch, devices=0)
    with refused(BackendError, "no device", "driver"):
        open_backend(exported, BackendOptions(backend="onnxruntime-rtx"))
    with refused(BackendError, "no device", "plugin.so"):
        open_backend(exported, BackendOptions(backend="onnxruntime-rtx"))


def test_options_out_of_range() -> None:
    with refused(BackendError, "streams", 1, 0):
        BackendOptions(streams=0)
    with refused(BackendError, "threads", 1, 0):
        BackendOptions(threads=0)
    with refused(BackendError, "threads", 10**6):
        BackendOptions(threads=10**6)
    with refused(BackendError, "verify", "'sometimes'"):
        BackendOptions(verify="sometimes")  # type: ignore[arg-type]


def test_the_cpu_is_the_last_resort() -> None:
    assert AUTO_BACKENDS[-2:] == ("onnxruntime-cpu", "openvino")
