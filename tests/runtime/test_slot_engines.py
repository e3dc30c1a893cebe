"""Engines whose images lie in slots, on the stand-ins for TensorRT and CUDA.

The stand-in for TensorRT refuses what a graph for slots does not take: rows that are no slots, and
padding that is not zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.artifacts.engine_record import EngineAttention
from mmvision_export.core.errors import BackendError, InputError
from mmvision_export.runtime.planner import LaunchLayout
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import HEAD_DIM_80, batch
from tests.support.errors import refused
from tests.support.fake_array import Tensor
from tests.support.fake_driver import (
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.fake_gpu import expected_embeds
from tests.support.fake_machine import KINDS, Machine
from tests.support.slots import slot_profiles

UNIFORM = slot_profiles([(1, 256), (4, 64), (4, 16)])
EQUAL = slot_profiles([(4, 64), (2, 16)], rows_per_slot=1)
MIXED = [(1, 16, 16), (1, 2, 2), (1, 6, 8), (1, 2, 4), (1, 8, 8), (1, 4, 4), (1, 2, 2)]


@pytest.fixture(params=KINDS)
def machine(
    request: pytest.FixtureRequest,
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """With an engine of uniform attention."""
    on_linux(monkeypatch)
    attention = EngineAttention(way="uniform", body="attention", fused=True)
    return Machine(fake_driver, tmp_path, UNIFORM, request.param, attention)


@pytest.fixture
def equal(
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """With an engine whose images fill their slots."""
    on_linux(monkeypatch)
    return Machine(fake_driver, tmp_path, EQUAL, attention=EngineAttention(way="equal"))


def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )


def check(encoder: VisionEncoder, grid: list[tuple[int, int, int]], seed: int = 0) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80, seed)
    expected = expected_embeds(pixels.astype(np.float16), HEAD_DIM_80.text_hidden_size)
    np.testing.assert_array_equal(encoder(pixels, rows), expected)


def test_batches_of_any_sizes_in_any_order(machine: Machine) -> None:
    with machine.encoder() as encoder:
        for seed, grid in enumerate([MIXED, MIXED[::-1], [(1, 2, 2)] * 9, [(1, 8, 8)] * 4]):
            check(encoder, grid, seed)
        info = encoder.info
        assert "the square of a slot" in info["splitting"]
        assert info["max_patches"] == encoder.max_patches == 256
        assert info["profiles"] == [
            "1 slots of at most 256 patches",
            "4 slots of at most 64 patches",
            "4 slots of at most 16 patches",
        ]
    assert machine.holds_nothing()


def test_the_stand_in_sees_padding_that_is_not_zeros(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: what an earlier batch left in a slot."""
    with machine.encoder(cuda_graphs=False) as encoder:
        check(encoder, [(1, 16, 16)])
        monkeypatch.setattr(LaunchLayout, "gaps", [])
        with pytest.raises((BackendError, AssertionError)):
            check(encoder, [(1, 2, 2)])
    machine.driver.failures.clear()


def test_the_stand_in_sees_rows_that_are_no_slots(
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another control: a packed batch, padded at its end."""
    on_linux(monkeypatch)
    machine = Machine(fake_driver, tmp_path, UNIFORM, attention=EngineAttention(way="native"))
    machine.trt.rows_per_slot = 2
    with machine.encoder() as encoder:
        with pytest.raises((BackendError, AssertionError)):
            check(encoder, [(1, 2, 2)] * 3)
    machine.driver.failures.clear()


def test_one_graph_for_each_bucket(machine: Machine) -> None:
    if machine.kind != "tensorrt":
        pytest.skip("TensorRT-RTX captures by itself")
    with machine.encoder(capture_on_open=True) as encoder:
        assert machine.driver.held("executables") == len(UNIFORM)
        before = machine.driver.count("cuMemAlloc")
        for seed in range(3):
            check(encoder, MIXED, seed)
        assert machine.driver.count("cuStreamBeginCapture") == len(UNIFORM)
        assert machine.driver.count("cuMemAlloc") == before
    assert machine.holds_nothing()


def test_captures_are_told_apart_by_their_slots(machine: Machine) -> None:
    """Two buckets have as many patches."""
    if machine.kind != "tensorrt":
        pytest.skip("TensorRT-RTX captures by itself")
    machine.driver.refuse_captures()
    with machine.encoder(capture_on_open=True) as encoder:
        check(encoder, MIXED)
        assert sorted(encoder.info["captures_refused"]) == sorted(encoder.info["profiles"])


@pytest.fixture
def named_like_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.float16", np.float16, raising=False)


@pytest.mark.usefixtures("named_like_torch")
def test_device_arrays_in_a_stream_of_the_callers(machine: Machine) -> None:
    """Each image is copied on the device into its slot, and its tokens out of it."""
    cuda = machine.driver.cuda()
    cuda.use()
    stream = cuda.new_stream()
    half = batch(MIXED, HEAD_DIM_80)[0].astype(np.float16)
    rows = np.array(MIXED)
    with machine.encoder() as encoder:
        to_device = machine.driver.count("cuMemcpyHtoDAsync")
        patches = Tensor(machine.driver, cuda, half, written_by=stream)
        copies = machine.driver.count("cuMemcpyDtoDAsync")
        out: Any = encoder(patches, rows, stream=stream)
        launches = machine.driver.count("cuMemcpyHtoDAsync") - to_device
        assert machine.driver.count("cuMemcpyDtoDAsync") - copies >= 2 * launches
        cuda.synchronize(stream)
        expected = expected_embeds(half, HEAD_DIM_80.text_hidden_size)
        np.testing.assert_array_equal(out.numpy(), expected)


def test_images_that_fill_their_slots(equal: Machine) -> None:
    with equal.encoder(capture_on_open=True) as encoder:
        for seed in range(2):
            check(encoder, [(1, 8, 8), (1, 4, 4), (4, 4, 4), (1, 2, 8), (1, 4, 16)], seed)
        with refused(InputError, "image 1", "48 patches", "112 x 84 pixels", 16, 64):
            check(encoder, [(1, 8, 8), (1, 6, 8)])
    assert equal.holds_nothing()


def test_an_image_larger_than_any_slot(machine: Machine) -> None:
    with machine.encoder() as encoder, refused(InputError, "image 1", 288, 72, 256, 64):
        check(encoder, [(1, 2, 2), (1, 16, 18)])


def test_a_device_with_too_little_memory_is_told_when_opening(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.launch_lane.device_available_bytes", lambda cuda: 1000
    )
    with refused(BackendError, "CUDA device 0", 1000):
        machine.open()
    assert machine.holds_nothing()


def test_an_engine_needs_no_more_than_it_holds(machine: Machine) -> None:
    with machine.encoder() as encoder:
        assert encoder.memory_for(256) is None
        assert encoder.available_bytes() is None
