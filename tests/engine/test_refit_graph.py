"""The graph by which an engine gets its weights: what a build writes, and whether a real parser knows them.

TensorRT-RTX builds no engine that takes weights without a GPU. Its parser runs without one, and says which weights have
the names that a refitter asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest

from mmvision_export.artifacts.build_options import BuildOptions
from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import OutputError
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.builder import Plan, PlanRequest
from mmvision_export.engine.polygraphy_setup import use_tensorrt
from tests.support.configs import copy_of

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


@pytest.fixture(scope="module")
def directory(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(exported, tmp_path_factory.mktemp("refit") / "m")


def build(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, force: bool = True, **options: Any
) -> Path:
    """Build with a builder that gives a plan at once, as if this machine had a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    def plan(request: PlanRequest, **_: Any) -> Plan:
        return Plan(b"plan", request.model)

    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    monkeypatch.setattr("mmvision_export.engine.build.refuse_options", lambda _: None)
    monkeypatch.setattr(
        "mmvision_export.engine.build.timing_on", lambda *_: contextlib.nullcontext()
    )
    engine, record = build_engine(
        directory,
        Manifest.read(directory),
        profiles=[PROFILE],
        backend="tensorrt-rtx",
        precision="fp16",
        compute_capabilities=[ComputeCapability(8, 9)],
        options=BuildOptions(**options),
        force=force,
    )
    assert EngineRecord.read(engine) == record
    return engine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strip_weights": True}, "-stripped"),
        ({"refit": True}, "-refit"),
        ({"strip_weights": True, "refit": True}, "-stripped-refit"),
    ],
)
def test_it_lies_beside_an_engine_that_takes_weights(
    directory: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    engine = build(directory, monkeypatch, **options)
    assert engine.stem.endswith(f"-sm89-fp16{words}")
    record = EngineRecord.read(engine)
    assert record.refit_graph is not None
    graph = record.refit_graph.content(engine)
    # The weights are not in it, and come from the weight file of its graph.
    assert len(graph) < 100_000 < (directory / "model.fp16.onnx.data").stat().st_size
    assert external_locations(graph) == {"model.fp16.onnx.data"}


@pytest.mark.parametrize(
    ("options", "is_kept"), [({"refit": True}, True), ({"strip_weights": True}, False)]
)
def test_an_engine_that_takes_other_weights_is_kept(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_kept: bool,
) -> None:
    """In the directory of another checkpoint, which has the same graph."""
    directory = copy_of(exported, tmp_path / "m")
    engine = build(directory, monkeypatch, **options)
    record = EngineRecord.read(engine)
    graph = dataclasses.replace(record.graph, data_sha256="0" * 64)
    dataclasses.replace(record, graph=graph).write(sidecar_path(engine))
    with pytest.raises(OutputError) as caught:
        build(directory, monkeypatch, force=False, **options)
    assert (caught.value.reason == "exists") is is_kept


def test_control_no_other_engine_has_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(directory, monkeypatch, weight_streaming=True)
    assert EngineRecord.read(engine).refit_graph is None
    assert not list(engine.parent.glob(f"{engine.stem}.refit.onnx"))


def test_a_parser_knows_every_weight_by_its_name(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX's own, of the network that the plan is built from."""
    engine = build(directory, monkeypatch, strip_weights=True)
    record = EngineRecord.read(engine)
    assert record.refit_graph is not None
    content = record.refit_graph.content(engine)
    model = onnx.load_model_from_string(content)
    # A refitter does not look into the definitions of functions.
    assert not model.functions
    weights = [each.name for each in model.graph.initializer if each.external_data]
    assert len(weights) > 30
    import tensorrt_rtx as trt

    use_tensorrt("tensorrt-rtx")
    from polygraphy.backend.trt import CreateNetwork
    from polygraphy.backend.trt.util import get_trt_logger

    _, network = CreateNetwork(strongly_typed=True)()
    parser = trt.OnnxParser(network, get_trt_logger())
    assert parser.parse(content, str(directory / record.graph.name))
    assert all(map(network.mark_weights_refittable, weights))
    # The control: a name that is no weight's.
    assert not network.mark_weights_refittable("layers.0.mlp.fc3.weight")
