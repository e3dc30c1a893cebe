"""ONNX Runtime's GPU providers, as far as that goes without a GPU.

What they are opened with, and what they refuse.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from mmvision_export.core.errors import BackendError
from mmvision_export.runtime.backends import AUTO_BACKENDS, BackendOptions, open_backend
from mmvision_export.runtime.backends.onnxruntime import create_session
from tests.support.errors import refused

NAME = "NvTensorRTRTXExecutionProvider"


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_provider_that_is_not_built_in(exported: Path, backend: str) -> None:
    if {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[backend] in str(
        onnxruntime.get_available_providers()
    ):
        pytest.skip("this ONNX Runtime has it")
    provider = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[backend]
    with refused(BackendError, f"{provider}ExecutionProvider") as caught:
        open_backend(exported, BackendOptions(backend=backend))
    assert caught.value.hint == "pip install '.[gpu]'"


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
        assert opened[0][1]["trt_engine_cache_path"] == str(
            exported / "plans" / "onnxruntime-tensorrt"
        )


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
    assert (
        plugin.cached
        == [{"nv_runtime_cache_path": str(exported / "plans" / "onnxruntime-rtx")}] * 2
    )
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


def test_the_cpu_is_the_last_resort() -> None:
    assert AUTO_BACKENDS[-2:] == ("onnxruntime-cpu", "openvino")
