"""The TensorRT backend, driven through a stand-in that enforces TensorRT's and CUDA's rules.

What a GPU computes has never been seen by these tests; that is for the test marked `gpu`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export.artifacts.build_target import TensorRTName
from mmvision_export.artifacts.companion_file import PluginFile
from mmvision_export.artifacts.engine_record import EngineAttention, EngineRecord
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile, profiles_from_buckets
from mmvision_export.core.errors import BackendError, InputError, ManifestError
from mmvision_export.core.files import file_record
from mmvision_export.core.trust import UntrustedError, record_built
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM, current_compute_capability
from mmvision_export.runtime.backends.device_array import device_array
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend, import_tensorrt
from mmvision_export.runtime.backends.tensorrt_rtx import default_runtime_cache
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, relative_l2
from tests.support.errors import refused
from tests.support.fake_array import Tensor
from tests.support.fake_driver import (
    SUCCESS,
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.fake_gpu import Cache, Context, expected_embeds
from tests.support.fake_machine import KINDS, Machine

DYNAMIC = [Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)]
BUCKETS = profiles_from_buckets([64, 256], [8], HEAD_DIM_80)
SIZES = {"dynamic": DYNAMIC, "buckets": BUCKETS}


@pytest.fixture(params=[(kind, sizes) for kind in KINDS for sizes in SIZES], ids="-".join)
def machine(
    request: pytest.FixtureRequest,
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    kind, sizes = request.param
    return Machine(fake_driver, tmp_path, SIZES[sizes], kind)


@pytest.fixture
def bucketed(
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """TensorRT with buckets, where graphs are captured here."""
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    return Machine(fake_driver, tmp_path, BUCKETS)


def check(encoder: VisionEncoder, grid: list[tuple[int, int, int]], seed: int = 0) -> None:
    pixels, rows = batch(grid, HEAD_DIM_80, seed)
    out = encoder(pixels, rows)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(
        out, expected_embeds(pixels.astype(np.float16), HEAD_DIM_80.text_hidden_size)
    )


def test_batches_of_any_size(machine: Machine) -> None:
    with machine.encoder() as encoder:
        for seed, grid in enumerate(
            ([(1, 6, 8)], [(1, 2, 2)], [(1, 8, 8), (1, 8, 8)], [(1, 2, 2)] * 8, [(1, 16, 16)])
        ):
            check(encoder, grid, seed)
        # More images and more patches than one launch takes.
        check(encoder, [(1, 2, 2)] * 30)
        check(encoder, [(1, 10, 12), (4, 4, 4), (1, 2, 2), (1, 16, 14)] * 3)
        assert encoder.info["attention"] == "attention body, fused"
        assert encoder.info["max_patches"] == 256
        assert "the square of a launch" in encoder.info["splitting"]
    assert machine.holds_nothing()


def test_nothing_is_allocated_after_opening(machine: Machine) -> None:
    with machine.encoder() as encoder:
        before = machine.driver.count("cuMemAlloc")
        for _ in range(10):
            check(encoder, [(1, 8, 8)])
            check(encoder, [(1, 2, 2)])
        assert machine.driver.count("cuMemAlloc") == before


def test_one_graph_for_each_bucket_captured_once_and_replayed(bucketed: Machine) -> None:
    with bucketed.encoder() as encoder:
        for count in range(1, 6):
            check(encoder, [(1, 2, 2)] * count, seed=count)
        count_of = bucketed.driver.count
        assert (count_of("cuStreamBeginCapture"), count_of("cuGraphLaunch")) == (1, 4)
        for size in (10, 12, 16):
            check(encoder, [(1, size, size)], seed=size)
        assert (count_of("cuStreamBeginCapture"), count_of("cuGraphLaunch")) == (2, 6)
        assert bucketed.driver.held("executables") == 2
    assert bucketed.holds_nothing()


def test_without_graphs_every_launch_is_enqueued(bucketed: Machine) -> None:
    with bucketed.encoder(cuda_graphs=False) as encoder:
        for _ in range(3):
            check(encoder, [(1, 6, 8)])
        assert encoder.info["cuda_graphs"] is False
    assert bucketed.driver.count("cuStreamBeginCapture") == 0


def test_profiles_share_the_memory_for_activations(bucketed: Machine) -> None:
    with bucketed.encoder():
        # Three buffers and one for activations: the largest bucket's.
        assert bucketed.driver.held("device_buffers") == 4


def test_an_image_beyond_the_profiles(machine: Machine) -> None:
    with (
        machine.encoder() as encoder,
        refused(InputError, "image 0", 288, 72),
    ):
        encoder(*batch([(1, 16, 18)], HEAD_DIM_80))


def test_resize_to_fit(machine: Machine) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (448, 504, 3), dtype=np.uint8)
    )
    with machine.encoder() as encoder:
        with refused(InputError, "504 x 448 pixels"):
            encoder.encode_images([image])
        (tokens,) = encoder.encode_images([image], resize_to_fit=True)
        assert 40 <= len(tokens) <= 64


@pytest.mark.parametrize(
    "call",
    [
        "Runtime",
        "deserialize_cuda_engine",
        "create_runtime_config",
        "create_runtime_cache",
        "set_runtime_cache",
        "create_execution_context",
        "set_optimization_profile_async",
        "set_tensor_address",
    ],
)
def test_failing_to_open_frees_everything(machine: Machine, call: str) -> None:
    if "runtime_" in call and machine.kind == "tensorrt":
        pytest.skip("TensorRT-RTX only")
    machine.trt.fail = call
    with refused(BackendError, "TensorRT", f"reason of {call}"):
        machine.open()
    assert machine.holds_nothing()


@pytest.mark.parametrize("call", ["set_input_shape", "execute_async_v3"])
def test_failing_to_run_is_an_error_and_not_the_end(machine: Machine, call: str) -> None:
    with machine.encoder() as encoder:
        machine.trt.fail = call
        with refused(BackendError, f"reason of {call}"):
            check(encoder, GRIDS["three"])
        machine.trt.fail = None
        check(encoder, GRIDS["three"])
    assert machine.holds_nothing()


CUDA_CALLS = [
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuDeviceGetAttribute",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemAlloc",
    "cuMemHostAlloc",
    "cuEventSynchronize",
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync",
    "cuEventRecord",
    "cuStreamSynchronize",
    "cuStreamDestroy",
    "cuMemFree",
    "cuMemFreeHost",
]
CAPTURE_CALLS = [
    "cuStreamBeginCapture",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
]


def fails_and_frees(machine: Machine, call: str) -> None:
    machine.driver.fail(call)
    with refused(BackendError, call, "CUDA_ERROR_OUT_OF_MEMORY"):
        with machine.encoder() as encoder:
            for _ in range(2):
                encoder(*batch(GRIDS["three"], HEAD_DIM_80))
    machine.driver.fail(call, SUCCESS)
    assert machine.holds_nothing()


@pytest.mark.parametrize("call", CUDA_CALLS)
def test_cuda_errors_are_named_and_free_everything(machine: Machine, call: str) -> None:
    fails_and_frees(machine, call)


@pytest.mark.parametrize("call", ["cuMemsetD8Async", "cuGraphLaunch"])
def test_errors_in_buckets_are_named_and_free_everything(bucketed: Machine, call: str) -> None:
    fails_and_frees(bucketed, call)


@pytest.mark.parametrize("call", CAPTURE_CALLS)
def test_a_capture_that_fails_costs_no_result_and_is_tried_once(
    bucketed: Machine, call: str
) -> None:
    with bucketed.encoder() as encoder:
        bucketed.driver.fail(call)
        for seed in range(3):
            check(encoder, [(1, 4, 4)], seed)
        assert bucketed.driver.count("cuStreamBeginCapture") == 1
        assert bucketed.driver.count("cuGraphLaunch") == 0
        reasons = encoder.info["captures_refused"]
        assert list(reasons) == ["64 patches, 9 rows"]
        assert f"{call} failed with CUDA_ERROR_OUT_OF_MEMORY" in reasons["64 patches, 9 rows"]
        # Another bucket is another capture.
        bucketed.driver.fail(call, SUCCESS)
        check(encoder, [(1, 16, 16)])
        check(encoder, [(1, 16, 16)])
        assert bucketed.driver.count("cuGraphLaunch") == 1
    assert bucketed.holds_nothing()


def test_an_engine_that_cannot_be_captured_runs_without_graphs(bucketed: Machine) -> None:
    """As one whose loop asks the host: TensorRT says no, and the capture is broken."""
    bucketed.driver.refuse_captures()
    with bucketed.encoder() as encoder:
        for seed, grid in enumerate([[(1, 4, 4)], [(1, 16, 16)]] * 2):
            check(encoder, grid, seed)
        assert bucketed.driver.count("cuStreamBeginCapture") == 2
        assert sorted(encoder.info["captures_refused"]) == [
            "256 patches, 9 rows",
            "64 patches, 9 rows",
        ]
        assert "Cuda Runtime (900)" in encoder.info["captures_refused"]["64 patches, 9 rows"]
    assert bucketed.holds_nothing()


def test_all_buckets_can_be_captured_when_opening(bucketed: Machine) -> None:
    with bucketed.encoder(capture_on_open=True, streams=2) as encoder:
        assert bucketed.driver.held("executables") == 4
        for seed, grid in enumerate([[(1, 4, 4)], [(1, 16, 16)]] * 2):
            check(encoder, grid, seed)
        assert bucketed.driver.count("cuStreamBeginCapture") == 4
    bucketed.driver.refuse_captures()
    with bucketed.encoder(capture_on_open=True) as encoder:
        assert len(encoder.info["captures_refused"]) == 2
        check(encoder, [(1, 4, 4)])
    assert bucketed.holds_nothing()


def test_the_default_stream_of_another_thread_breaks_no_capture(
    bucketed: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = bucketed.driver.cuda()
    cuda.use()
    memory = cuda.allocate(16)
    execute = Context.execute_async_v3

    def disturbed(context: Context, stream: int) -> bool:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(cuda.use).result()
            pool.submit(cuda.zero, memory, 16, LEGACY_STREAM).result()
        return execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", disturbed)
    with bucketed.encoder() as encoder:
        check(encoder, [(1, 4, 4)])
        assert "captures_refused" not in encoder.info
    # The control: on a blocking stream it does.
    monkeypatch.setattr("mmvision_export.runtime.backends.cuda._NON_BLOCKING", 0)
    with bucketed.encoder() as encoder:
        check(encoder, [(1, 4, 4)])
        assert "IMPLICIT" in encoder.info["captures_refused"]["64 patches, 9 rows"]
    cuda.synchronize(LEGACY_STREAM)
    cuda.free(memory)
    cuda.close()


def test_a_second_failure_while_freeing_does_not_hide_the_first(machine: Machine) -> None:
    machine.trt.fail = "create_execution_context"
    machine.driver.fail("cuStreamDestroy")
    with refused(BackendError, "reason of create_execution_context"):
        machine.open()


def test_a_sidecar_of_other_profiles(bucketed: Machine) -> None:
    bucketed.trt.profiles = bucketed.trt.profiles[:1]
    with refused(ManifestError, "optimization profiles", 1, 2):
        bucketed.open()
    assert bucketed.holds_nothing()


def test_closed(machine: Machine) -> None:
    encoder = machine.encoder()
    encoder.close()
    encoder.close()
    with refused(BackendError, "encoder", "closed"):
        encoder(*batch(GRIDS["three"], HEAD_DIM_80))


def test_a_foreign_engine_is_never_deserialised(machine: Machine) -> None:
    machine.driver.set_device(sm=120)
    with refused(ManifestError, "compute capability", "8.6, 8.9", "12.0"):
        machine.open()
    machine.driver.set_device(sm=89)
    machine.engine.write_bytes(b"executable Content")
    with refused(ManifestError, machine.engine, "sha256"):
        machine.open()
    assert machine.trt.deserialised == []


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"config": dataclasses.replace(HEAD_DIM_80, text_hidden_size=4)}, ["image_embeds", 4]),
        ({"precision": "fp32"}, ["pixel_values", 2, 4]),
        ({"profiles": tuple(profiles_from_buckets([64, 1024], [8], HEAD_DIM_80))}, [(256, 1176)]),
    ],
    ids=["width", "type", "sizes"],
)
def test_an_engine_that_is_not_its_sidecars_runs_nothing(
    machine: Machine, changes: dict[str, Any], facts: list[object]
) -> None:
    """Its buffers would be of the sidecar's sizes, and it would write past them."""
    record = EngineRecord.read(machine.engine)
    if "profiles" in changes and record.profiles != tuple(BUCKETS):
        pytest.skip("of buckets")
    machine.encoder().close()  # the control
    dataclasses.replace(record, **changes).write(machine.engine.with_suffix(".json"))
    with refused(ManifestError, machine.engine, *facts):
        machine.open()
    assert machine.holds_nothing()


def foreign_engine(machine: Machine) -> Path:
    """The machine's engine replaced by one that nobody has built here, with a sidecar that fits."""
    machine.engine.write_bytes(b"somebody's content")
    record = EngineRecord.read(machine.engine)
    changed = dataclasses.replace(record, engine=file_record(machine.engine))
    changed.write(machine.engine.with_suffix(".json"))
    return machine.engine


def test_an_engine_that_was_not_built_here_is_never_deserialised(machine: Machine) -> None:
    engine = foreign_engine(machine)
    for trust in (None, False):
        with refused(UntrustedError, engine, reason="unsafe"):
            machine.open(trust=trust)
    assert machine.trt.deserialised == []
    machine.encoder(trust=True).close()
    assert machine.trt.deserialised == [b"somebody's content"]
    engine.chmod(0o666)
    with refused(UntrustedError, engine, reason="unsafe"):
        machine.open(trust=True)


def test_naming_an_engine_trusts_it_and_naming_its_directory_does_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = foreign_engine(machine)
    seen: list[bool | None] = []

    def open_nothing(self: Any, path: Path, options: BackendOptions, **_: Any) -> None:
        seen.append(options.trust)

    monkeypatch.setattr(TensorRTBackend, "__init__", open_nothing)
    module = "mmvision_export.runtime.backends.tensorrt"
    monkeypatch.setattr(f"{module}.import_tensorrt", lambda kind: machine.trt)
    monkeypatch.setattr(f"{module}.Cuda", lambda device: None)
    monkeypatch.setattr(f"{module}.open_fitting", lambda path, opened: opened(engine, None))
    for path, trust in (
        (engine, None),
        (engine.parent, None),
        (engine, False),
        (engine.parent, True),
    ):
        TensorRTBackend.open(path, BackendOptions(trust=trust))
    assert seen == [True, False, False, True]


def test_the_bytes_that_were_hashed_are_those_deserialised(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file takes the engine's place once it is hashed: the first one is deserialised."""
    sha256 = hashlib.sha256

    def hash_and_replace(content: Any) -> Any:
        digest = sha256(content)
        if bytes(content) == b"executable content":
            other = machine.engine.with_suffix(".new")
            other.write_bytes(b"somebody's content")
            other.replace(machine.engine)
        return digest

    monkeypatch.setattr("mmvision_export.core.files.hashlib.sha256", hash_and_replace)
    machine.encoder().close()
    assert machine.trt.deserialised == [b"executable content"]
    # The control: what is there now is refused.
    with refused(ManifestError, machine.engine, "sha256"):
        machine.open()
    assert len(machine.trt.deserialised) == 1


def test_the_plugin_library_is_loaded_before_the_engine(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = machine.engine.parent / "libmmvision_plugins-abc.so"
    record = EngineRecord.read(machine.engine)
    library.write_bytes(f"library in {library.parent}".encode())
    plugins = PluginFile(library.name, file_record(library))
    dataclasses.replace(
        record, attention=EngineAttention(way="plugin"), plugin_library=plugins
    ).write(machine.engine.with_suffix(".json"))
    loaded: list[tuple[Path, str]] = []

    def load(module: Any, path: Path, sha256: str) -> None:
        assert module.deserialised == []  # not a byte of the engine has been touched
        loaded.append((path, sha256))

    monkeypatch.setattr("mmvision_export.runtime.backends.tensorrt.load_plugin_library", load)
    with refused(
        UntrustedError, library, reason="unsafe"
    ):  # the engine was built here, the library was not
        machine.open()
    assert (loaded, machine.trt.deserialised) == ([], [])
    assert record_built(plugins.record.sha256, library) is None
    with machine.encoder() as encoder:
        check(encoder, [(1, 8, 8)])
        assert encoder.info["plugin_library"] == library.name
        assert "the square of an image" in encoder.info["splitting"]
    assert loaded == [(library, plugins.record.sha256)]
    library.unlink()
    with refused(ManifestError, library.name):
        machine.open()


def test_threads_share_an_encoder(machine: Machine) -> None:
    """Each gets its own result, from as many lanes as there are streams."""
    with machine.encoder(streams=2) as encoder:
        assert machine.driver.held("streams") == 2

        def work(seed: int) -> None:
            check(encoder, [(1, 2, 2 + 2 * (seed % 7)), (1, 4, 4)], seed)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(200)))
    assert machine.holds_nothing()


def test_closing_waits_for_running_calls_and_tells_waiting_ones(machine: Machine) -> None:
    encoder = machine.encoder()
    running, go_on = threading.Event(), threading.Event()
    execute = Context.execute_async_v3

    def slow(context: Context, stream: int) -> bool:
        running.set()
        assert go_on.wait(10)
        return execute(context, stream)

    def call() -> Any:
        return encoder(*batch([(1, 2, 2)], HEAD_DIM_80))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(Context, "execute_async_v3", slow)
        first = pool.submit(call)
        assert running.wait(10)
        waiting = pool.submit(call)
        closing = pool.submit(encoder.close)
        time.sleep(0.1)
        assert not closing.done()
        go_on.set()
        closing.result(10)
        assert len(first.result(10)) == 1
        # It waited for the lane: it got either the lane, before closing did, or the error.
        error = waiting.exception(10)
        assert error is None or "the encoder is closed" in str(error)
    assert machine.holds_nothing()


def tensor(machine: Machine, host: np.ndarray, **options: Any) -> Tensor:
    return Tensor(machine.driver, machine.driver.cuda(), host, **options)


class Stream:
    """As torch has it."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


MANY = [(1, 6, 8), (1, 2, 2), (1, 8, 10)] * 3


@pytest.fixture
def named_like_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.float16", np.float16, raising=False)


@pytest.mark.usefixtures("named_like_torch")
@pytest.mark.parametrize("whose", ["none", "default", "legacy", "per thread", "own"])
def test_device_arrays_go_in_and_out_without_the_host(machine: Machine, whose: str) -> None:
    """The patches are still being written, in the given stream, at the call."""
    pixels, rows = batch(MANY, HEAD_DIM_80)
    half = pixels.astype(np.float16)
    cuda = machine.driver.cuda()
    cuda.use()
    own = cuda.new_stream()
    # torch's current stream has handle 0 by default, which is DLPack's 1.
    handle = {"none": 0, "default": 0, "legacy": 1, "per thread": 2, "own": own}[whose]
    with machine.encoder() as encoder:
        patches = tensor(machine, half, written_by=handle)
        grid = tensor(machine, rows)
        waited = machine.driver.count("cuStreamSynchronize")
        out = encoder(patches, grid, stream=None if whose == "none" else Stream(handle))
        assert isinstance(out, Tensor)
        assert patches.asked_for == [handle or 1]
        expected = expected_embeds(half, HEAD_DIM_80.text_hidden_size)
        if whose != "none":
            if not encoder.info["cuda_graphs"] or machine.kind == "tensorrt-rtx":
                assert machine.driver.count("cuStreamSynchronize") == waited
                assert not np.array_equal(out.numpy(), expected)  # it has not waited
            cuda.synchronize(handle)
        np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.usefixtures("named_like_torch")
def test_calls_in_streams_of_the_callers_follow_each_other(machine: Machine) -> None:
    """One lane, two streams, nothing waited for until the end: each result is its own."""
    cuda = machine.driver.cuda()
    cuda.use()
    streams = [cuda.new_stream(), cuda.new_stream()]
    batches = [batch(MANY, HEAD_DIM_80, seed) for seed in range(6)]
    with machine.encoder() as encoder:
        given = [
            tensor(machine, pixels.astype(np.float16), written_by=streams[i % 2])
            for i, (pixels, _) in enumerate(batches)
        ]
        outs = [
            encoder(patches, rows, stream=streams[i % 2])
            for i, (patches, (_, rows)) in enumerate(zip(given, batches, strict=True))
        ]
        for stream in reversed(streams):
            cuda.synchronize(stream)
        for (pixels, _), out in zip(batches, outs, strict=True):
            half = pixels.astype(np.float16)
            expected = expected_embeds(half, HEAD_DIM_80.text_hidden_size)
            np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.usefixtures("named_like_torch")
def test_closing_waits_for_what_is_in_a_stream(machine: Machine) -> None:
    """Memory that queued work uses must not be freed: the stand-in says so."""
    cuda = machine.driver.cuda()
    cuda.use()
    stream = cuda.new_stream()
    pixels, rows = batch([(1, 4, 4)], HEAD_DIM_80)
    half = pixels.astype(np.float16)
    encoder = machine.encoder()
    out = encoder(tensor(machine, half), rows, stream=stream)
    encoder.close()
    cuda.synchronize(stream)
    expected = expected_embeds(half, HEAD_DIM_80.text_hidden_size)
    np.testing.assert_array_equal(out.numpy(), expected)
    # The control: without waiting it is found.
    encoder = machine.encoder()
    encoder(tensor(machine, half), rows, stream=stream)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BackendError):
        patch.setattr("mmvision_export.runtime.backends.cuda.Cuda.synchronize", lambda *_: None)
        encoder.close()
    assert "device memory was freed that queued work uses" in machine.driver.broken_rules()


@pytest.mark.parametrize("stream", [None, 0, 1, -1, 2])
def test_the_array_holds_dlpacks_table_of_streams(machine: Machine, stream: int | None) -> None:
    """The control of the tests above."""
    cuda = machine.driver.cuda()
    cuda.use()
    values = np.arange(4, dtype=np.float16)
    writer = cuda.new_stream()
    array = tensor(machine, values, written_by=writer)
    if stream == 0:
        with pytest.raises(AssertionError):
            array.__dlpack__(stream=stream)
        return
    array.__dlpack__(stream=stream)
    cuda.synchronize(2 if stream == 2 else LEGACY_STREAM)
    is_there = np.array_equal(array.numpy(), values)
    assert is_there == (stream != -1)
    cuda.synchronize(writer)


def test_a_library_that_refuses_the_stream_is_an_error_of_ours(machine: Machine) -> None:
    array = tensor(machine, np.zeros((4, 4), np.float16))
    with pytest.raises(InputError) as caught:
        device_array(array, name="pixel_values", stream=0)
    assert "pixel_values" in str(caught.value)
    assert "unsupported stream 0" in str(caught.value)


def test_host_arrays_in_a_stream_of_the_callers(machine: Machine) -> None:
    cuda = machine.driver.cuda()
    cuda.use()
    with machine.encoder() as encoder:
        pixels, rows = batch([(1, 6, 8)], HEAD_DIM_80)
        for handle in (0, cuda.new_stream()):
            out = encoder(pixels, rows, stream=Stream(handle))
            np.testing.assert_array_equal(
                out, expected_embeds(pixels.astype(np.float16), HEAD_DIM_80.text_hidden_size)
            )
        for wrong in ("0", True, -1):
            with refused(InputError, "stream", wrong if wrong == -1 or wrong is True else "str"):
                encoder(pixels, rows, stream=wrong)


def test_bad_device_arrays(machine: Machine) -> None:
    pixels, rows = batch([(1, 6, 8)], HEAD_DIM_80)
    half = pixels.astype(np.float16)
    with machine.encoder() as encoder:
        with refused(InputError, "pixel_values", 1, 0):
            encoder(tensor(machine, half, device=1), rows)
        with refused(InputError, "pixel_values", "float16", "float32"):
            encoder(tensor(machine, pixels), rows)
        with refused(InputError, "pixel_values", "[48, 8]"):
            encoder(tensor(machine, half[:, :8]), rows)
        with refused(InputError, 48, 44):
            encoder(tensor(machine, half[:44]), rows)


def test_rows_of_the_grid_are_not_overwritten_before_they_are_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch for each image, and none runs before the last is enqueued."""
    grid = [(1, 16, 12), (1, 12, 16), (1, 16, 14), (1, 14, 16), (1, 16, 16)]
    with machine.encoder(cuda_graphs=False) as encoder:
        check(encoder, grid)
        assert machine.trt.first_rows == grid
        # The control: without its guard the rows of later launches are there too early.
        monkeypatch.setattr("mmvision_export.runtime.backends.cuda.Cuda.wait_here", lambda *_: None)
        machine.trt.first_rows.clear()
        with contextlib.suppress(BackendError, AssertionError):
            check(encoder, grid)
        assert machine.trt.first_rows != grid
    machine.driver.failures.clear()


def test_warnings_of_tensorrt_are_logged(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.trt.fail = "Runtime"
    with caplog.at_level(logging.WARNING, "mmvision_export.tensorrt"):
        with pytest.raises(BackendError) as caught:
            machine.open()
    assert [(r.name, r.message) for r in caplog.records] == [
        ("mmvision_export.tensorrt", "not a reason")
    ]
    assert "not a reason" not in str(caught.value)


def test_the_runtime_cache_is_kept_and_checked(
    fake_driver: FakeDriver,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = Machine(fake_driver, tmp_path, BUCKETS, "tensorrt-rtx")
    file = default_runtime_cache(machine.engine)
    assert file is not None
    # Compiled kernels are code: one that came with the engine is not even looked at.
    machine.engine.with_suffix(".rtxcache").write_bytes(Cache.magic)
    with machine.encoder() as encoder:
        assert encoder.info["runtime_cache"].endswith(": new")
        assert encoder.info["kernels"] == "eager"
    assert file.read_bytes() == Cache.magic + b"."
    with machine.encoder() as encoder:
        assert encoder.info["runtime_cache"].endswith(": read")
    assert file.read_bytes() == Cache.magic + b".."
    file.write_bytes(b"of another GPU")
    with machine.encoder(kernels="lazy") as encoder:
        assert "of another machine or version, not used" in encoder.info["runtime_cache"]
    assert file.read_bytes() == Cache.magic + b"."
    file.chmod(0o666)
    with machine.encoder(kernels="lazy") as encoder:
        assert "not used" in encoder.info["runtime_cache"]
    file.chmod(0o600)
    assert [c.dynamic_shapes_kernel_specialization_strategy for c in machine.trt.configs] == [
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert all(config.cuda_graph_strategy == 1 for config in machine.trt.configs)
    with refused(BackendError, "kernels", "lazy, eager, none", "'fast'"):
        machine.open(kernels="fast")
    with machine.encoder(runtime_cache=tmp_path / "engine.engine" / "x") as encoder:
        pass  # cannot be written: the next process compiles again


def test_a_folder_named_tensorrt_is_not_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        __import__("sys").modules, "tensorrt", __import__("types").ModuleType("tensorrt")
    )
    with refused(BackendError, "tensorrt"):
        import_tensorrt("tensorrt")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", sorted(SIZES))
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engine_on_a_gpu(backend: TensorRTName, sizes: str, exported: Path, tmp_path: Path) -> None:
    """Never run so far: build for this GPU, run, and compare with ONNX Runtime on the CPU."""
    from mmvision_export.engine.build import build_engine
    from tests.support.configs import copy_of

    assert current_compute_capability() is not None, "no CUDA GPU"
    try:
        import_tensorrt(backend)
    except BackendError as error:
        pytest.skip(str(error))
    directory = copy_of(exported, tmp_path / "m")
    build_engine(
        directory,
        Manifest.read(directory),
        profiles=SIZES[sizes],
        precision="fp16",
        backend=backend,
    )
    with (
        VisionEncoder.open(directory, backend=backend) as gpu,
        VisionEncoder.open(directory, backend="onnxruntime-cpu") as cpu,
    ):
        for grid in [*GRIDS.values()] * 2:  # captured, then replayed
            assert (
                relative_l2(gpu(*batch(grid, HEAD_DIM_80)), cpu(*batch(grid, HEAD_DIM_80))) < 5e-3
            )
