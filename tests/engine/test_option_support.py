"""Build options that a TensorRT has not, refused before any work; and those that it has, which are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget, TensorRTName, TensorRTVersion
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError
from mmvision_export.engine.attention import _obstacle_to_plugins
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.option_support import BuildRequest, refuse_options
from mmvision_export.runtime.backends.cuda import current_gpu
from tests.support.configs import copy_of
from tests.support.errors import refused

LEVELS = SimpleNamespace(AMPERE_PLUS=1, SAME_COMPUTE_CAPABILITY=2)


def request(
    backend: TensorRTName = "tensorrt",
    version: str = "10.13.3.9",
    gpus: str = "8.9",
    timing_cache: Path | None = None,
    has_gpu: bool = True,
    levels: Any = LEVELS,
    **options: Any,
) -> BuildRequest:
    target = BuildTarget(
        backend=backend,
        tensorrt_version=TensorRTVersion("1.7.1.116" if backend == "tensorrt-rtx" else version),
        platform="linux-x86_64",
        compute_capabilities=tuple(map(ComputeCapability.parse, gpus.split())),
        precision="fp16",
        opset=23,
        options=BuildOptions(**options),
    )
    return BuildRequest(
        target=target,
        module=SimpleNamespace(HardwareCompatibilityLevel=levels),
        timing_cache=timing_cache,
        has_gpu=has_gpu,
    )


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"version_compatible": True}, ["--version-compatible", "that release only"]),
        ({"hardware": "ampere-plus"}, ["--hardware-compatible", "no hardware compatibility level"]),
        ({"optimization_level": 3}, ["--optimization-level", "every level"]),
        ({"timing_cache": Path("t")}, ["--timing-cache", "times nothing"]),
        ({"strip_weights": True, "has_gpu": False}, ["--strip-weights", "GPU"]),
        ({"refit": True, "has_gpu": False}, ["--refit", "GPU"]),
        ({"refit": True, "gpus": "8.6 8.9"}, ["--refit", "8.6, 8.9", "at most one"]),
    ],
)
def test_what_tensorrt_rtx_has_not(options: dict[str, Any], facts: list[str]) -> None:
    with refused(EngineError, "TensorRT-RTX 1.7.1.116", *facts) as caught:
        refuse_options(request("tensorrt-rtx", **options))
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workspace_bytes": 1 << 30, "has_gpu": False},
        {"weight_streaming": True, "has_gpu": False, "gpus": "8.6 8.9 12.0"},
        {"strip_weights": True, "refit": True},
    ],
)
def test_what_tensorrt_rtx_has(options: dict[str, Any]) -> None:
    refuse_options(request("tensorrt-rtx", **options))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"hardware": "ampere-plus", "gpus": "8.7"}, ["8.7", "Jetson"]),
        ({"hardware": "ampere-plus", "gpus": "7.5"}, ["7.5", "8.0"]),
        ({"hardware": "same-compute-capability", "gpus": "7.0"}, ["7.0", "7.5"]),
        (
            {"hardware": "same-compute-capability", "levels": SimpleNamespace(AMPERE_PLUS=1)},
            ["same-compute-capability", "10.13.3.9"],
        ),
        ({"refit": True, "version": "11.3.0.1"}, ["--refit", "11.3.0.1", "bias"]),
    ],
)
def test_what_tensorrt_has_not_there(options: dict[str, Any], facts: list[str]) -> None:
    with refused(EngineError, *facts):
        refuse_options(request(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"timing_cache": Path("t"), "optimization_level": 5, "version_compatible": True},
        {"hardware": "ampere-plus", "gpus": "8.0"},
        {"hardware": "same-compute-capability", "gpus": "7.5"},
        {"strip_weights": True, "version": "11.3.0.1"},
        {"refit": True, "version": "11.4.0.1", "gpus": "8.7", "weight_streaming": True},
    ],
)
def test_what_tensorrt_has(options: dict[str, Any]) -> None:
    refuse_options(request(**options))


def test_a_version_compatible_engine_has_no_plugins_of_ours() -> None:
    obstacle = _obstacle_to_plugins(request(version_compatible=True).target)
    assert obstacle is not None
    assert "version-compatible" in obstacle
    assert _obstacle_to_plugins(request().target) is None


@pytest.mark.parametrize(
    "options",
    [
        {"options": BuildOptions(optimization_level=5)},
        {"options": BuildOptions(strip_weights=True)},
        {"timing_cache": Path("timings")},
    ],
)
def test_refused_before_any_work(exported: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if current_gpu() is not None:
        pytest.skip("this machine has a GPU, with which weights can be stripped")
    directory = copy_of(exported, tmp_path / "m")
    before = sorted(directory.rglob("*"))
    with refused(EngineError, "TensorRT-RTX"):
        build_engine(
            directory,
            Manifest.read(directory),
            profiles=[Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)],
            backend="tensorrt-rtx",
            precision="fp16",
            compute_capabilities=[ComputeCapability(8, 9)],
            **options,
        )
    assert sorted(directory.rglob("*")) == before
