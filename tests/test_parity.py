"""The comparison passes what is right and fails what is wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from polygraphy.backend.base import BaseRunner

from mmvision_export.errors import CheckpointError, ManifestError, ParityError
from mmvision_export.manifest import Manifest, file_record
from mmvision_export.metrics import metrics
from mmvision_export.onnx_export import export_model_directory
from mmvision_export.onnx_files import derive_fp16, save_cpu_graph
from mmvision_export.parity import (
    GATES,
    REFERENCE,
    ParityResult,
    _distances,
    check_parity,
    record_parity,
)
from mmvision_export.runners import input_metadata
from mmvision_export.sample_batches import CHECK_GRIDS, PARITY_GRIDS, sample_batch
from mmvision_export.sidecar import Profile
from mmvision_export.weights import WeightSource
from tests.configs import HEAD_DIM_80, copy_of
from tests.test_checkpoint import LAYOUTS, STATE, write_checkpoint

GRAPHS = {"model.onnx", "model.cpu.onnx", "model.fp16.onnx"}


def check(directory: Path, **options: Any) -> ParityResult:
    result = check_parity(directory, **{"grids": CHECK_GRIDS, **options})
    record_parity(directory, result)
    return result


def test_default_grids_pass_in_both_precisions(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    derive_fp16(directory, Manifest.read(directory))
    result = check(directory, grids=PARITY_GRIDS)
    assert result.passed
    assert {row.runner for row in result.rows} == {"pytorch-fp32", "pytorch-fp16", *GRAPHS}
    assert {row.grid for row in result.rows} == set(PARITY_GRIDS)
    for row in result.rows:
        assert row.metrics.relative_l2 < (2e-6 if row.precision == "fp32" else 5e-3)
    recorded = Manifest.read(directory).parity
    assert set(recorded) == GRAPHS
    assert recorded["model.onnx"]["passed"] is True
    assert recorded["model.onnx"]["grids"]["mixed sizes"]["patches"] == 276
    assert recorded["model.onnx"]["grids"]["mixed sizes"]["relative_l2"] < 2e-6


def rewrite(directory: Path, change: Callable[[ir.Model], None]) -> None:
    """Change the graph of a model directory, and its manifest with it."""
    model = ir.load(directory / "model.onnx")
    change(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, directory / "model.onnx", external_data="model.onnx.data")
    manifest = Manifest.read(directory)
    save_cpu_graph(directory, manifest.config)  # the weights lie elsewhere in their file now
    for name in ("model.onnx", "model.cpu.onnx", "model.onnx.data"):
        manifest.files[name] = file_record(directory / name)
    manifest.write(directory)


def scale_weights(model: ir.Model) -> None:
    value = model.graph.initializers["layers.1.mlp.fc1.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001), name=value.name)


def leak_between_images(model: ir.Model) -> None:
    function = model.functions["mmvision", "VarlenAttention", ""]
    equal = next(node for node in function if node.op_type == "Equal")
    equal.op_type = "GreaterOrEqual"  # a patch sees its own image and those before it


def swap_rotation(model: ir.Model) -> None:
    function = model.functions["mmvision", "QKRotaryEmbedding", ""]
    next(node for node in function if node.op_type == "Sub").op_type = "Add"


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
def test_planted_faults_fail(fault: Callable[[ir.Model], None], reason: str, exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    rewrite(directory, fault)
    result = check(directory)
    assert not result.passed
    failures = [failure for row in result.rows if row.runner == "model.onnx" for failure in row.failures]
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
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        check(directory)
    assert check(directory, source=WeightSource(checkpoint=str(moved))).passed

    other = {name: tensor * 2 for name, tensor in STATE.items()}
    write_checkpoint(tmp_path / "other", LAYOUTS["released"](other))
    with pytest.raises(ParityError, match="the weights have sha256"):
        check(directory, source=WeightSource(checkpoint=str(tmp_path / "other")))


def test_bf16_cannot_be_compared_on_a_cpu(tmp_path: Path) -> None:
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=1), tmp_path / "m", precision="bf16")
    with pytest.raises(ParityError, match="nothing in .* can be run on this machine"):
        check(tmp_path / "m")


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
    with pytest.raises(ValueError, match="shapes differ"):
        metrics(reference[:1], reference)


@pytest.mark.parametrize("precision", GATES)
def test_gates_fail_on_nan(precision: str) -> None:
    from mmvision_export.metrics import Metrics

    nan = float("nan")
    assert GATES[precision].failures(Metrics(nan, nan, nan, 0), None)
    assert GATES[precision].failures(Metrics(0, 0, 1, 1), None)
    assert not GATES[precision].failures(Metrics(0, 0, 1, 0), Metrics(0, 0, 1, 0))


def test_sample_batches_are_seeded_and_exact_in_float16() -> None:
    first, grid = sample_batch(PARITY_GRIDS["mixed sizes"], HEAD_DIM_80, seed=0)
    again, _ = sample_batch(PARITY_GRIDS["mixed sizes"], HEAD_DIM_80, seed=0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, first.astype(np.float16))
    assert grid.prod(axis=1).sum() == len(first)


class Doubling(BaseRunner):  # type: ignore[misc]
    """Stands in for an engine: doubles the reference, within a profile."""

    profile = Profile(min_patches=4, opt_patches=16, max_patches=40, max_images=8)

    def get_input_metadata_impl(self) -> Any:
        return input_metadata(HEAD_DIM_80)

    def infer_impl(self, feed_dict: Any) -> Any:
        self.inference_time = 0.0
        return OrderedDict(image_embeds=2 * feed_dict["pixel_values"][::4, :96])


class Plain(Doubling):
    """The reference of the above, of any size."""

    profile = Profile(min_patches=4, opt_patches=16, max_patches=4000, max_images=80)

    def infer_impl(self, feed_dict: Any) -> Any:
        self.inference_time = 0.0
        return OrderedDict(image_embeds=feed_dict["pixel_values"][::4, :96])


def test_grids_beyond_an_engines_profile_are_left_out_with_a_note() -> None:
    from tests.test_engine import Notes

    batches = {name: sample_batch(grid, HEAD_DIM_80, seed=0) for name, grid in CHECK_GRIDS.items()}
    notes = Notes()
    found = _distances([Plain(name=REFERENCE), Doubling(name="engine")], batches, notes)
    assert set(found["engine"]) == {"one block"}
    assert found["engine"]["one block"].relative_l2 == pytest.approx(1.0)
    assert notes.notes == ["engine does not take two sizes, which is beyond its profile"]


def test_two_processes_do_not_lose_each_others_results(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    slow = check_parity(directory, grids=CHECK_GRIDS)
    derive_fp16(directory, Manifest.read(directory))  # another process, while the comparison ran
    record_parity(directory, slow)
    manifest = Manifest.read(directory)
    assert "model.fp16.onnx" in manifest.files
    assert manifest.parity["model.onnx"]["passed"] is True
