"""What is built instead where the builder fails, and what is no occasion for that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.engine_record import EngineAttention, EngineRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError
from mmvision_export.core.files import FileRecord
from mmvision_export.engine.attempts import Attempt, attempts_from_lowering, first_that_builds
from mmvision_export.engine.attention import Lowering
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.builder import BuilderError, Plan, PlanRequest, plan_from_model
from mmvision_export.engine.polygraphy_setup import use_tensorrt
from tests.support.configs import copy_of
from tests.support.errors import refused
from tests.support.notes import Notes

LIBRARY = (
    Path("libmmvision_plugins.so"),
    PluginLibraryRecord(
        library=FileRecord.of(b"a library"),
        machine="x86_64",
        sms=[80],
        head_dims=[80],
        dtypes=["fp16"],
        versions={},
    ),
)
NATIVE = Lowering("attention")
PACKED = Lowering("packed", fallback=NATIVE)
PLUGIN = Lowering(None, LIBRARY, PACKED)
PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


def names(lowering: Lowering, *, precision: str = "fp16", parser: Any = (11, 1)) -> list[str]:
    return list(map(str, attempts_from_lowering(lowering, precision=precision, parser=parser)))


def test_every_form_of_layer_norm_comes_before_the_next_way_of_attention() -> None:
    separate = ", separate LayerNormalization"
    ways = ["plugin attention", "packed attention", "fused native attention", "native attention"]
    assert names(PLUGIN) == [way + form for way in ways for form in ("", separate)]


@pytest.mark.parametrize(
    ("lowering", "options", "expected"),
    [
        # Before 10.6 the parser gets it separate from the start.
        (
            Lowering(None, LIBRARY, Lowering("matmul")),
            {"parser": (10, 3)},
            ["plugin attention", "native attention"],
        ),
        # In float32 nothing fuses attention.
        (NATIVE, {"precision": "fp32", "parser": (10, 5)}, ["native attention"]),
        (
            Lowering("uniform_matmul"),
            {"parser": (10, 3)},
            ["uniform attention"],
        ),
        (
            Lowering("equal_attention", fallback=NATIVE),
            {"precision": "fp32", "parser": (10, 5)},
            ["equal attention", "native attention"],
        ),
        # Who asks for a way gets it or an error.
        (Lowering("packed"), {"parser": (10, 5)}, ["packed attention"]),
    ],
)
def test_what_there_is_to_try(
    lowering: Lowering, options: dict[str, Any], expected: list[str]
) -> None:
    assert names(lowering, **options) == [f"{n}, separate LayerNormalization" for n in expected]


def test_slots_are_tried_fused_and_then_from_several_kernels() -> None:
    """Both cost the square of a slot; masking the whole batch comes last."""
    uniform = Lowering("uniform_attention", fallback=NATIVE)
    separate = ", separate LayerNormalization"
    ways = ["fused uniform", "uniform", "fused native", "native"]
    assert names(uniform) == [f"{way} attention{form}" for way in ways for form in ("", separate)]


class Builder:
    """Builds what is named, and fails with the next of its messages at anything else."""

    def __init__(self, builds: str, failures: list[EngineError] | None = None) -> None:
        self.builds = builds
        self.failures = failures or []
        self.asked: list[str] = []

    def __call__(self, attempt: Attempt) -> Plan:
        self.asked.append(str(attempt))
        if str(attempt) == self.builds:
            return Plan(b"plan")
        if self.failures:
            raise self.failures.pop(0)
        raise BuilderError(f"failure {len(self.asked)}")


def all_attempts() -> list[Attempt]:
    return attempts_from_lowering(PLUGIN, precision="fp16", parser=(11, 1))


@pytest.mark.parametrize("builds", names(PLUGIN))
def test_any_failure_of_the_builder_leads_to_the_next_way(builds: str) -> None:
    notes = Notes()
    builder = Builder(builds)
    built = first_that_builds(all_attempts(), builder, notes)
    before = names(PLUGIN)[: names(PLUGIN).index(builds)]
    assert (str(built.attempt), built.plan.content) == (builds, b"plan")
    # Every reason is kept, the first one first.
    assert list(built.passed_over.items()) == [
        (name, f"failure {index}") for index, name in enumerate(before, 1)
    ]
    assert len(notes.notes) == len(before)
    assert all(f"failure {index}" in note for index, note in enumerate(notes.notes, 1))
    # Only where masked attention takes another's place does it cost more.
    costly = [note for note in notes.notes if "square" in note]
    assert len(costly) == ("native" in builds)


def test_where_nothing_builds_the_first_error_is_told() -> None:
    builder = Builder("none of them")
    with pytest.raises(EngineError) as caught:
        first_that_builds(all_attempts(), builder, Notes())
    assert builder.asked == names(PLUGIN)
    assert str(caught.value).startswith("failure 1\n")
    assert all(name in str(caught.value) for name in builder.asked[1:])
    with pytest.raises(BuilderError, match="^failure 1$"):
        first_that_builds(all_attempts()[:1], Builder("none of them"), Notes())


def test_attention_without_a_fused_kernel_is_not_mended_by_another_layer_norm() -> None:
    builder = Builder(
        "native attention", [BuilderError("this is not supported by a dedicated kernel")]
    )
    attempts = attempts_from_lowering(NATIVE, precision="fp16", parser=(11, 1))
    built = first_that_builds(attempts, builder, Notes())
    assert builder.asked == ["fused native attention", "native attention"]
    assert not built.attempt.fused


def test_other_failures_are_no_occasion() -> None:
    """The control: what the parser says, or a lack of memory, ends the build at once."""
    builder = Builder("native attention", [EngineError("cannot parse")])
    with pytest.raises(EngineError, match="^cannot parse$"):
        first_that_builds(all_attempts(), builder, Notes())
    assert builder.asked == ["plugin attention"]


class FailingBuilder:
    """Polygraphy's builder: fails so often, with TensorRT's messages, and then builds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: str) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        use_tensorrt("tensorrt-rtx")  # before Polygraphy looks for one by itself
        import polygraphy.backend.trt as polygraphy

        self.failures = list(failures)
        self.runs = 0
        monkeypatch.setattr(polygraphy, "EngineBytesFromNetwork", lambda *_, **__: self.run)

    def run(self) -> bytes:
        from polygraphy.exception import PolygraphyException

        self.runs += 1
        if not self.failures:
            return b"plan"
        logging.getLogger("Polygraphy").error(self.failures.pop(0))
        raise PolygraphyException("Invalid Engine")


def build(directory: Path, **options: Any) -> tuple[Path, EngineRecord]:
    return build_engine(
        directory,
        Manifest.read(directory),
        profiles=[PROFILE],
        backend="tensorrt-rtx",
        compute_capabilities=[ComputeCapability(8, 9)],
        **options,
    )


NO_IMPLEMENTATION = (
    "10: Could not find any implementation for node {ForeignNode[layers.0.layer_norm1]}"
)


def test_a_layer_norm_that_has_no_implementation(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Myelin of TensorRT 10 says; the sidecar keeps it."""
    builder = FailingBuilder(monkeypatch, NO_IMPLEMENTATION)
    requests: list[bytes] = []

    def plan(request: PlanRequest, **options: Any) -> Plan:
        requests.append(request.model)
        return plan_from_model(request, **options)

    monkeypatch.setattr("mmvision_export.engine.build.plan_from_model", plan)
    notes = Notes()
    engine, record = build(copy_of(exported, tmp_path / "m"), progress=notes)
    assert builder.runs == 2
    assert [b"LayerNormalization" in model for model in requests] == [True, False]
    (way,) = record.passed_over
    assert way == "native attention"
    assert NO_IMPLEMENTATION in record.passed_over[way]
    assert record.attention == EngineAttention(way="native", body="attention")
    assert EngineRecord.read(engine) == record
    assert any(NO_IMPLEMENTATION in note for note in notes.notes)


@pytest.mark.parametrize(
    "message",
    [
        "2: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory",
        "1: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "4: [builder.cpp::build::1] Error Code 4: Internal Error (std::bad_alloc)",
    ],
)
def test_a_lack_of_memory_ends_the_build(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """Something slower might fit, and would be slower for good."""
    builder = FailingBuilder(monkeypatch, message)
    directory = copy_of(exported, tmp_path / "m")
    with refused(EngineError, message) as caught:
        build(directory)
    assert builder.runs == 1
    assert "memory" in str(caught.value.hint)
    assert not list(directory.glob("plans/*"))


def test_a_graph_that_is_not_parsed_is_not_written_otherwise(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way would build: none is tried after the parser has failed."""
    builder = FailingBuilder(monkeypatch)
    monkeypatch.setattr(
        "mmvision_export.engine.build.choose_lowering",
        lambda *_, **__: Lowering(None, None, NATIVE),
    )
    with refused(EngineError, "VarlenAttention"):
        build(copy_of(exported, tmp_path / "m"))
    assert builder.runs == 0
