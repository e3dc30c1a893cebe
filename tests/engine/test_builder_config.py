"""Options as a builder takes them: TensorRT-RTX's own, which needs no GPU, and a stand-in for TensorRT's rules."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget, TensorRTVersion
from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.builder_config import config_from_target, set_options
from mmvision_export.engine.polygraphy_setup import use_tensorrt
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)
ADA = ComputeCapability(8, 9)


@pytest.fixture(scope="module")
def directory(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(exported, tmp_path_factory.mktemp("options") / "m")


def build(directory: Path, **options: Any) -> tuple[Path, EngineRecord]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return build_engine(
        directory,
        Manifest.read(directory),
        profiles=[PROFILE],
        backend="tensorrt-rtx",
        precision="fp16",
        compute_capabilities=[ADA],
        options=BuildOptions(**options),
        force=True,
    )


@pytest.fixture(scope="module")
def plain(directory: Path) -> tuple[Path, EngineRecord]:
    return build(directory)


def test_engines_of_other_options_lie_beside_each_other(
    directory: Path, plain: tuple[Path, EngineRecord]
) -> None:
    """One is built to stream its weights, which is another plan of the same length."""
    streaming, record = build(directory, weight_streaming=True, workspace_bytes=2 << 30)
    assert streaming.name.endswith("-sm89-fp16-workspace2g-streaming.engine")
    assert EngineRecord.read(streaming) == record
    assert record.options == BuildOptions(weight_streaming=True, workspace_bytes=2 << 30)
    engine, other = plain
    assert engine.name.endswith("-sm89-fp16.engine")
    assert other.options == BuildOptions()
    assert record.engine.sha256 != other.engine.sha256
    assert hashlib.sha256(engine.read_bytes()).hexdigest() == other.engine.sha256


def test_a_workspace_that_is_too_small_is_no_occasion_for_slower_attention(directory: Path) -> None:
    with refused(EngineError, "workspace") as caught:
        build(directory, workspace_bytes=1 << 20)
    assert "1M" in str(caught.value.hint)
    assert "nor could be built" not in str(caught.value)
    assert not list(directory.glob("plans/*workspace1m*"))


def rtx_config(**options: Any) -> tuple[Any, Any, BuildOptions]:
    """TensorRT-RTX's own configuration of a network without layers."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    use_tensorrt("tensorrt-rtx")
    from polygraphy.backend.trt import CreateNetwork

    chosen = BuildOptions(**options)
    target = BuildTarget(
        backend="tensorrt-rtx",
        tensorrt_version=TensorRTVersion(str(trt.__version__)),
        platform="linux-x86_64",
        compute_capabilities=(ADA,),
        precision="fp16",
        opset=23,
        options=chosen,
    )
    builder, network = CreateNetwork(strongly_typed=True)()
    for name, kind, width in (
        ("pixel_values", trt.float16, HEAD_DIM_80.patch_dim),
        ("grid_thw", trt.int64, 3),
    ):
        network.add_input(name, kind, (-1, width))
    loader = config_from_target(
        trt,
        target,
        profiles=[PROFILE],
        patch_dim=HEAD_DIM_80.patch_dim,
        monitor=None,
        timings=b"",
    )
    return trt, loader(builder, network), chosen


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, set()),
        ({"strip_weights": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"strip_weights": True, "refit": True}, {"STRIP_PLAN", "REFIT"}),
        ({"refit": True}, {"REFIT"}),
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE"}),
    ],
)
def test_flags_of_the_builder(options: dict[str, Any], flags: set[str]) -> None:
    trt, config, chosen = rtx_config(**options)
    set_options(trt, config, chosen)
    ours = {"STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "VERSION_COMPATIBLE"}
    assert {name for name in ours if config.get_flag(getattr(trt.BuilderFlag, name))} == flags


def test_numbers_of_the_builder() -> None:
    trt, config, chosen = rtx_config(workspace_bytes=3 << 30, optimization_level=5)
    set_options(trt, config, chosen)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 << 30
    assert config.builder_optimization_level == 5


def test_an_option_that_the_builder_ignores_is_an_error() -> None:
    """TensorRT-RTX 1.7 logs that it has no hardware compatibility level, and builds without one."""
    trt, config, chosen = rtx_config(hardware="ampere-plus")
    with refused(EngineError, "hardware_compatibility_level", "AMPERE_PLUS"):
        set_options(trt, config, chosen)


class Config:
    """A configuration that takes nothing."""

    builder_optimization_level = 3

    def set_flag(self, flag: str) -> None:
        pass

    def get_flag(self, flag: str) -> bool:
        return False

    def get_memory_pool_limit(self, pool: str) -> int:
        return 1 << 36


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"strip_weights": True}, "STRIP_PLAN"),
        ({"refit": True}, "REFIT"),
        ({"weight_streaming": True}, "WEIGHT_STREAMING"),
        ({"version_compatible": True}, "VERSION_COMPATIBLE"),
        ({"optimization_level": 5}, "builder_optimization_level"),
        ({"workspace_bytes": 1 << 30}, "workspace"),
    ],
)
def test_control_every_option_is_compared(options: dict[str, Any], fact: str) -> None:
    flags = ("STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "VERSION_COMPATIBLE")
    module = SimpleNamespace(
        __version__="10.13",
        BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
    )
    with refused(EngineError, fact):
        set_options(module, Config(), BuildOptions(**options))
    set_options(module, Config(), BuildOptions())
