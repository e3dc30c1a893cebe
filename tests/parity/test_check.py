"""The comparison passes what is right and fails what is wrong."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from polygraphy.backend.base import BaseRunner

from mmvision_export.artifacts.manifest import Manifest, model_directory_of
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core import files, records
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError, CheckpointError, ManifestError, ParityError
from mmvision_export.core.metrics import metrics
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.sample_batches import CHECK_GRIDS, PARITY_GRIDS, sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.parity import candidates
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.measuring import distances_from_runners, embeds_from_runner
from mmvision_export.parity.result import REFERENCE, ParityResult, record_parity
from mmvision_export.parity.runners import input_metadata
from mmvision_export.parity.samples import samples_from_grids
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.checkpoints import LAYOUTS, STATE, write_checkpoint
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused
from tests.support.faults import leak_between_images, rewrite, scale_weights, swap_rotation
from tests.support.notes import Notes

CHECK_SAMPLES = samples_from_grids(HEAD_DIM_80, CHECK_GRIDS)
GRAPHS = {"model.onnx", "model.cpu.onnx", "model.uniform.onnx", "model.fp16.onnx"}


def check(directory: Path, **options: Any) -> ParityResult:
    result = check_parity(directory, **{"samples": CHECK_SAMPLES, **options})
    record_parity(result)
    return result


def test_default_grids_pass_in_both_precisions(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    derive_fp16(directory, Manifest.read(directory))
    result = check(directory, samples=())
    assert result.passed
    assert {row.runner for row in result.rows} == {
        "pytorch-fp32", "pytorch-fp16", *GRAPHS, "model.fp16.onnx (rounded)",
        "model.uniform.onnx (OpenVINO)",
    }  # fmt: skip
    assert {row.sample for row in result.rows} == set(PARITY_GRIDS)
    for row in result.rows:
        assert row.metrics.relative_l2 < (2e-6 if row.precision == "fp32" else 5e-3)
    recorded = Manifest.read(directory).parity
    assert set(recorded) == GRAPHS
    assert recorded["model.onnx"]["passed"] is True
    assert recorded["model.onnx"]["layers"]["first_jump"] is None
    assert recorded["model.fp16.onnx"]["rounded"]["mixed sizes"]["failures"] == []
    assert recorded["model.onnx"]["grids"]["mixed sizes"]["patches"] == 276
    assert recorded["model.onnx"]["grids"]["mixed sizes"]["relative_l2"] < 2e-6


def overflow(model: ir.Model) -> None:
    value = model.graph.initializers["layers.0.mlp.fc1.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e38), name=value.name)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (scale_weights, "relative L2"),
        (leak_between_images, "relative L2"),
        (swap_rotation, "relative L2"),
        (overflow, "not finite"),
    ],
)
def test_planted_faults_fail(
    fault: Callable[[ir.Model], None], reason: str, exported: Path, tmp_path: Path
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, fault)
    result = check(directory)
    assert not result.passed
    failures = [
        failure for row in result.rows if row.runner == "model.onnx" for failure in row.failures
    ]
    assert any(reason in failure for failure in failures)
    assert Manifest.read(directory).parity["model.onnx"]["passed"] is False
    assert "NaN" not in (directory / "manifest.json").read_text()


def test_rewriting_alone_does_not_fail(exported: Path, tmp_path: Path) -> None:
    """The control of the controls."""
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, lambda _: None)
    assert check(directory).passed


def test_checkpoint_is_loaded_again_and_must_be_the_same(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", LAYOUTS["released"](STATE))
    directory = tmp_path / "m"
    manifest = export_model_directory(WeightSource(checkpoint=str(checkpoint)), directory)
    assert manifest.source["checkpoint"] == str(checkpoint)
    assert check(directory).passed

    moved = checkpoint.rename(tmp_path / "moved")
    with refused(CheckpointError, checkpoint, reason="missing"):
        check(directory)
    assert check(directory, source=WeightSource(checkpoint=str(moved))).passed

    other = {name: tensor * 2 for name, tensor in STATE.items()}
    write_checkpoint(tmp_path / "other", LAYOUTS["released"](other))
    with refused(ParityError, "sha256", manifest.source["sha256"]):
        check(directory, source=WeightSource(checkpoint=str(tmp_path / "other")))


def test_bf16_is_compared_by_rounding(tmp_path: Path) -> None:
    export_model_directory(
        WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="bf16"
    )
    notes = Notes()
    result = check(tmp_path / "m", progress=notes)
    assert result.passed
    assert {row.runner for row in result.rows} == {"pytorch-bf16", "model.onnx (rounded)"}
    assert any(
        "is bf16, which ONNX Runtime's CPU provider cannot run" in note for note in notes.notes
    )
    recorded = Manifest.read(tmp_path / "m").parity["model.onnx"]
    assert recorded["passed"] is True
    assert recorded["grids"] == {}
    # It is bfloat16 that was measured: 2**-9 relative for each rounding.
    assert 2**-9 < recorded["rounded"]["two sizes"]["relative_l2"] < 2**-5


def test_an_engine_outside_a_model_directory_has_nothing_to_be_compared_with(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.engine").write_bytes(b"engine")
    with refused(ParityError, tmp_path / "x.engine", "plans/"):
        check_parity(tmp_path / "x.engine")


def test_damaged_directory(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    (directory / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(ManifestError):
        check(directory)


def test_metrics_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]])
    distance = metrics(np.array([[3.0, 4.0], [0.0, 1.0]]), reference)
    assert distance.max_abs == 1.0
    assert distance.relative_l2 == pytest.approx(np.sqrt(2 / 26))
    assert distance.min_cosine == pytest.approx(0.0)
    assert metrics(reference, reference).min_cosine == pytest.approx(1.0)
    bad = metrics(np.array([[np.nan, 4.0], [np.inf, 0.0]]), reference)
    assert bad.non_finite == 2
    assert np.isnan(bad.relative_l2)
    assert metrics(reference, np.array([[np.nan, 4.0], [1.0, 0.0]])).non_finite == 1
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(2, 2\)"):
        metrics(reference[:1], reference)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gates_fail_on_nan(precision: str) -> None:
    from mmvision_export.core.metrics import Metrics

    nan = float("nan")
    assert PRECISIONS[precision].gate.failures(Metrics(nan, nan, nan, 0), None)
    assert PRECISIONS[precision].gate.failures(Metrics(0, 0, 1, 1), None)
    assert not PRECISIONS[precision].gate.failures(Metrics(0, 0, 1, 0), Metrics(0, 0, 1, 0))


def test_sample_batches_are_seeded_and_exact_in_float16() -> None:
    first, grid = sample_batch(PARITY_GRIDS["mixed sizes"], HEAD_DIM_80, seed=0)
    again, _ = sample_batch(PARITY_GRIDS["mixed sizes"], HEAD_DIM_80, seed=0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, first.astype(np.float16))
    assert grid.prod(axis=1).sum() == len(first)


class Doubling(BaseRunner):  # type: ignore[misc]
    """Stands in for an engine: doubles the reference, within a profile."""

    profiles = (Profile(min_patches=4, opt_patches=16, max_patches=40, max_images=8),)

    def get_input_metadata_impl(self) -> Any:
        return input_metadata(HEAD_DIM_80)

    def infer_impl(self, feed_dict: Any) -> Any:
        self.inference_time = 0.0
        return OrderedDict(image_embeds=2 * feed_dict["pixel_values"][::4, :96])


class Plain(Doubling):
    """The reference of the above, of any size."""

    profiles = (Profile(min_patches=4, opt_patches=16, max_patches=4000, max_images=80),)

    def infer_impl(self, feed_dict: Any) -> Any:
        self.inference_time = 0.0
        return OrderedDict(image_embeds=feed_dict["pixel_values"][::4, :96])


def test_grids_beyond_an_engines_profile_are_left_out_with_a_note() -> None:
    notes = Notes()
    with Plain(name=REFERENCE) as plain:
        reference = embeds_from_runner(plain, CHECK_SAMPLES, progress=notes)
    found = distances_from_runners(
        [Doubling(name="engine")], CHECK_SAMPLES, reference=reference, progress=notes
    )
    assert set(found["engine"]) == {"one block"}
    assert found["engine"]["one block"].metrics.relative_l2 == pytest.approx(1.0)
    assert notes.advanced == len(CHECK_SAMPLES) + 1  # every sample, and the one that is taken
    assert notes.notes == ["engine does not take two sizes, which is beyond its profile"]


def test_two_processes_do_not_lose_each_others_results(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    slow = check_parity(directory, samples=CHECK_SAMPLES)
    derive_fp16(directory, Manifest.read(directory))  # another process, while the comparison ran
    record_parity(slow)
    manifest = Manifest.read(directory)
    assert "model.fp16.onnx" in manifest.files
    assert manifest.parity["model.onnx"]["passed"] is True


PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)


@pytest.fixture
def engine(exported: Path, tmp_path: Path) -> Path:
    """An engine in the plans/ of a model directory."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from mmvision_export.engine.build import build_engine

    directory = copy_of(exported, tmp_path / "m")
    built, _ = build_engine(
        directory,
        Manifest.read(directory),
        profiles=[PROFILE],
        backend="tensorrt-rtx",
        compute_capabilities=[ComputeCapability(8, 9)],
    )
    return built


class Opened:
    """Stands in for an opened engine, which no machine without a GPU opens.

    PyTorch in float32, times a factor.
    """

    def __init__(self, factor: float) -> None:
        self._encoder = WeightSource(random_config=HEAD_DIM_80, seed=1).load(torch.float32).encoder
        self._factor = np.float32(factor)
        self.closed = 0

    def __call__(self, pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            embeds = self._encoder(torch.from_numpy(pixel_values), torch.from_numpy(grid_thw))
        return np.asarray(embeds.numpy() * self._factor)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_one_engine_is_judged_as_the_graph_it_was_built_from(
    factor: float, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is right passes, and one that is wrong fails; either is opened once, and closed."""
    stands: list[Opened] = []

    def opened(path: Path, *, backend: str, trust: bool, refuse_non_finite: bool) -> Opened:
        assert (path, backend, trust) == (engine, "tensorrt-rtx", True)  # it was named
        assert not refuse_non_finite  # a gate judges what is not finite
        stands.append(Opened(factor))
        return stands[-1]

    monkeypatch.setattr(VisionEncoder, "open", opened)
    result = check_parity(engine, samples=CHECK_SAMPLES)
    assert {row.subject for row in result.rows} == {None, f"plans/{engine.name}"}
    assert result.passed is (factor == 1.0)
    assert list(result.layers.graphs) == ["model.onnx"]
    assert [stand.closed for stand in stands] == [1]


def test_an_engine_that_does_not_open_is_passed_over_unless_it_was_asked_for(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = VisionEncoder.open

    def no_gpu(path: Path, **options: Any) -> VisionEncoder:
        if path.suffix == ".engine":
            raise BackendError("made for another GPU")
        return opened(path, **options)

    monkeypatch.setattr(VisionEncoder, "open", no_gpu)
    monkeypatch.setattr(candidates, "current_compute_capability", lambda: "8.6")
    notes = Notes()
    result = check_parity(
        model_directory_of(engine) or engine, samples=CHECK_SAMPLES, progress=notes
    )
    assert {row.subject for row in result.rows} == {
        None,
        "model.onnx",
        "model.cpu.onnx",
        "model.uniform.onnx",
    }
    assert f"{engine.name} is not compared: made for another GPU" in notes.notes
    # Whoever names it is told, before PyTorch has run.
    notes = Notes()
    with pytest.raises(BackendError):
        check_parity(engine, samples=CHECK_SAMPLES, progress=notes)
    assert notes.steps == []


def test_each_file_is_hashed_each_graph_loaded_and_the_manifest_read_once(
    mmvision: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    derive_fp16(directory, Manifest.read(directory))
    seen: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        before = getattr(module, name)

        def call(path: Path, *rest: Any, **options: Any) -> Any:
            seen[f"{name} {Path(path).name}"] += 1
            return before(path, *rest, **options)

        monkeypatch.setattr(module, name, call)

    counted(files, "sha256_of")
    counted(ir, "load")
    counted(records, "read_json")
    assert mmvision("parity", "--model", str(directory)).code == 0
    graphs = sorted(GRAPHS)
    weights = ["model.onnx.data", "model.fp16.onnx.data"]
    assert seen == {
        **{f"load {name}": 1 for name in graphs},
        **{f"sha256_of {name}": 1 for name in [*graphs, *weights]},
        "sha256_of model.uniform.onnx": 2,  # OpenVINO opens the directory as it is deployed
        "sha256_of preprocessor_config.json": 1,  # and its preprocessing with it
        # OpenVINO's backend and the encoder read the manifest too; and once more to write the result.
        "read_json manifest.json": 4,
    }
