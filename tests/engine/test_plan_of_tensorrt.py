"""The way to a plan of TensorRT, with TensorRT-RTX's module in its place.

TensorRT is installed on no machine of ours. TensorRT-RTX has the same API, and builds without a GPU: so Polygraphy's
configuration, the parser, the builder and the timing cache are called for real. The engine inspector is not: it reads a
deserialised engine, which needs a driver.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.build_target import BuildTarget, TensorRTVersion
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError
from mmvision_export.engine.attention import Lowering, lowered_model
from mmvision_export.engine.builder import Plan, PlanRequest, plan_from_model
from mmvision_export.engine.polygraphy_setup import use_tensorrt
from mmvision_export.engine.timing_cache import TimingCache
from mmvision_export.runtime.backends.cuda import current_compute_capability
from tests.support.configs import HEAD_DIM_80
from tests.support.errors import refused
from tests.support.notes import Notes

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)

pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")


@pytest.fixture
def request_of(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    use_tensorrt("tensorrt-rtx")
    monkeypatch.setattr("mmvision_export.engine.builder.use_tensorrt", lambda _: None)
    monkeypatch.setattr("mmvision_export.engine.builder.import_tensorrt", lambda _: trt)
    model = lowered_model(exported / "model.onnx", Lowering("attention"), (11, 1))

    def request(**options: Any) -> PlanRequest:
        return PlanRequest(
            model=ir.serde.serialize_model(model).SerializeToString(),
            location=exported / "model.onnx",
            target=BuildTarget(
                backend="tensorrt",
                tensorrt_version=TensorRTVersion(str(trt.__version__)),
                platform="linux-x86_64",
                compute_capabilities=(ComputeCapability(8, 9),),
                precision="fp32",
                opset=23,
                options=BuildOptions(**options),
            ),
            profiles=[PROFILE],
            patch_dim=HEAD_DIM_80.patch_dim,
            timing_cache=TimingCache(tmp_path / "timings", is_named=True),
        )

    return request


def test_a_plan_with_options_and_timings(request_of: Any) -> None:
    notes = Notes()
    request = request_of(weight_streaming=True, workspace_bytes=4 << 30, optimization_level=5)
    plan = plan_from_model(request, decomposable=True, progress=notes)
    assert isinstance(plan, Plan)
    assert len(plan.content) > 100_000
    assert plan.model == request.model
    # TensorRT-RTX has no timings to write: the next build reads the file all the same.
    written = request.timing_cache.path.read_bytes()
    assert written
    assert plan_from_model(request, decomposable=True, progress=Notes()).content == plan.content
    assert "listing the layers" in notes.steps
    if current_compute_capability() is None:
        assert plan.layers is None
        assert any("no report of its layers" in note for note in notes.notes)


def test_an_option_that_the_builder_does_not_take(request_of: Any) -> None:
    with refused(EngineError, "hardware_compatibility_level"):
        plan_from_model(request_of(hardware="ampere-plus"), decomposable=True, progress=Notes())


def test_what_is_no_timing_cache_is_refused_before_the_build(request_of: Any) -> None:
    """TensorRT-RTX makes an empty cache of it, with a warning."""
    request = request_of()
    request.timing_cache.path.write_bytes(b"no timings")
    notes = Notes()
    with refused(EngineError, request.timing_cache.path):
        plan_from_model(request, decomposable=True, progress=notes)
    assert "building engine" not in notes.steps
    assert request.timing_cache.path.read_bytes() == b"no timings"
