"""The TensorRT backend, driven through a stand-in that enforces TensorRT's and CUDA's rules.

What a GPU computes has never been seen by these tests; that is for the test marked `gpu`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export.artifacts.build_target import TensorRTName
from mmvision_export.artifacts.engine_record import EngineAttention, EngineRecord, PluginFile
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile, profiles_from_buckets
from mmvision_export.core.errors import BackendError, InputError, ManifestError
from mmvision_export.core.files import file_record
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda, current_compute_capability
from mmvision_export.runtime.backends.device_array import _pointer_of, _Tensor
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend, import_tensorrt
from mmvision_export.runtime.backends.tensorrt_rtx import TensorRTRTXBackend
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, relative_l2
from tests.support.engines import write_engine
from tests.support.errors import refused
from tests.support.fake_gpu import Cache, Context, Runtime, TensorRT, expected_embeds

DYNAMIC = [Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)]
BUCKETS = profiles_from_buckets([64, 256], 8, HEAD_DIM_80)
SIZES = {"dynamic": DYNAMIC, "buckets": BUCKETS}
KINDS: dict[str, type[TensorRTBackend]] = {
    "tensorrt": TensorRTBackend,
    "tensorrt-rtx": TensorRTRTXBackend,
}


class Machine:
    """A fake GPU machine with one engine."""

    def __init__(
        self, folder: Path, kind: str = "tensorrt", profiles: Sequence[Profile] = DYNAMIC
    ) -> None:
        self.kind = kind
        self.cuda = Runtime()
        limits = [
            {
                "pixel_values": (p.min_patches, p.max_patches),
                "grid_thw": (p.min_images, p.max_images),
            }
            for p in profiles
        ]
        self.trt = TensorRT(self.cuda, HEAD_DIM_80.text_hidden_size, limits)
        self.engine = write_engine(
            folder, config=HEAD_DIM_80, backend=kind, profiles=tuple(profiles)
        )

    def open(self, **options: Any) -> TensorRTBackend:
        cuda = Cuda(0, runtime=self.cuda)
        return KINDS[self.kind](
            self.engine, BackendOptions(**options), module=self.trt, cuda=cuda, manifest=None
        )

    def encoder(self, **options: Any) -> VisionEncoder:
        return VisionEncoder(self.open(**options), PreprocessorConfig())

    def holds_nothing(self) -> bool:
        return self.cuda.holds_nothing()


@pytest.fixture(params=[(kind, sizes) for kind in KINDS for sizes in SIZES], ids="-".join)
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    kind, sizes = request.param
    return Machine(tmp_path, kind, SIZES[sizes])


@pytest.fixture
def bucketed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """TensorRT with buckets, where graphs are captured here."""
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    return Machine(tmp_path, "tensorrt", BUCKETS)


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
        before = machine.cuda.log.count("cudaMalloc")
        for _ in range(10):
            check(encoder, [(1, 8, 8)])
            check(encoder, [(1, 2, 2)])
        assert machine.cuda.log.count("cudaMalloc") == before


def test_one_graph_for_each_bucket_captured_once_and_replayed(bucketed: Machine) -> None:
    with bucketed.encoder() as encoder:
        for count in range(1, 6):
            check(encoder, [(1, 2, 2)] * count, seed=count)
        log = bucketed.cuda.log
        assert (log.count("cudaStreamBeginCapture"), log.count("cudaGraphLaunch")) == (1, 4)
        for size in (10, 12, 16):
            check(encoder, [(1, size, size)], seed=size)
        assert (log.count("cudaStreamBeginCapture"), log.count("cudaGraphLaunch")) == (2, 6)
        assert len(bucketed.cuda.executables) == 2
    assert bucketed.holds_nothing()


def test_without_graphs_every_launch_is_enqueued(bucketed: Machine) -> None:
    with bucketed.encoder(cuda_graphs=False) as encoder:
        for _ in range(3):
            check(encoder, [(1, 6, 8)])
        assert encoder.info["cuda_graphs"] is False
    assert "cudaStreamBeginCapture" not in bucketed.cuda.log


def test_profiles_share_the_memory_for_activations(bucketed: Machine) -> None:
    with bucketed.encoder():
        # Three buffers and one for activations: the largest bucket's.
        assert len(bucketed.cuda.memory) == 4
        assert max(map(bucketed.trt.memory_bytes, range(2))) in {
            len(m) for m in bucketed.cuda.memory.values()
        }


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
    "cudaSetDevice",
    "cudaDeviceGetAttribute",
    "cudaStreamCreate",
    "cudaEventCreateWithFlags",
    "cudaMalloc",
    "cudaStreamWaitEvent",
    "cudaMemcpyAsync",
    "cudaEventRecord",
    "cudaStreamSynchronize",
]
GRAPH_CALLS = [
    "cudaMemsetAsync",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphDestroy",
    "cudaGraphLaunch",
]


def fails_and_frees(machine: Machine, call: str) -> None:
    machine.cuda.fail = call
    with refused(BackendError, call, "cudaErrorMemoryAllocation", "out of memory"):
        with machine.encoder() as encoder:
            for _ in range(2):
                encoder(*batch(GRIDS["three"], HEAD_DIM_80))
    assert call in machine.cuda.log
    assert machine.holds_nothing()


@pytest.mark.parametrize("call", CUDA_CALLS)
def test_cuda_errors_are_named_and_free_everything(machine: Machine, call: str) -> None:
    fails_and_frees(machine, call)


@pytest.mark.parametrize("call", GRAPH_CALLS)
def test_errors_of_graphs_are_named_and_free_everything(bucketed: Machine, call: str) -> None:
    fails_and_frees(bucketed, call)


def test_a_refusal_during_capture_ends_the_capture(bucketed: Machine) -> None:
    with bucketed.encoder() as encoder:
        begin = bucketed.cuda.cudaStreamBeginCapture

        def begin_and_fail(stream: int, mode: int) -> tuple[int]:
            bucketed.trt.fail = "execute_async_v3"
            return begin(stream, mode)

        bucketed.cuda.cudaStreamBeginCapture = begin_and_fail  # type: ignore[method-assign,assignment]
        with refused(BackendError, "reason of execute_async_v3"):
            check(encoder, [(1, 4, 4)])
        bucketed.trt.fail = None
        bucketed.cuda.cudaStreamBeginCapture = begin  # type: ignore[method-assign]
        check(encoder, [(1, 4, 4)])
    assert bucketed.holds_nothing()


@pytest.mark.parametrize("rule", ["allocate", "synchronize", "other stream", "before it ran"])
def test_the_stand_in_sees_broken_rules_of_capture(bucketed: Machine, rule: str) -> None:
    """The control of the tests above."""
    cuda = Cuda(0, runtime=bucketed.cuda)
    stream, other = cuda.new_stream(), cuda.new_stream()
    memory = cuda.allocate(16)
    context = Context(bucketed.trt)
    context.profile, context.memory = 0, (memory, 16)
    context.shapes = {"pixel_values": (64, 1176), "grid_thw": (9, 3)}
    context.addresses = dict.fromkeys(("pixel_values", "grid_thw", "image_embeds"), memory)
    broken: dict[str, Callable[[], Any]] = {
        "allocate": lambda: cuda.allocate(16),
        "synchronize": lambda: cuda.synchronize(stream),
        "other stream": lambda: cuda.zero(memory, 16, other),
        "before it ran": lambda: context.execute_async_v3(stream),
    }
    with pytest.raises(AssertionError):
        cuda.captured(broken[rule], stream)


def test_a_second_failure_while_freeing_does_not_hide_the_first(machine: Machine) -> None:
    machine.trt.fail = "create_execution_context"
    machine.cuda.fail = "cudaStreamDestroy"
    with refused(BackendError, "reason of create_execution_context"):
        machine.open()


def test_a_sidecar_of_other_profiles(bucketed: Machine) -> None:
    bucketed.trt.profiles = bucketed.trt.profiles[:1]
    with refused(BackendError, "optimization profiles", 1, 2):
        bucketed.open()
    assert bucketed.holds_nothing()


def test_closed(machine: Machine) -> None:
    encoder = machine.encoder()
    encoder.close()
    encoder.close()
    with refused(BackendError, "encoder", "closed"):
        encoder(*batch(GRIDS["three"], HEAD_DIM_80))


def test_a_foreign_engine_is_never_deserialised(machine: Machine) -> None:
    machine.cuda.capability = (12, 0)
    with refused(ManifestError, "compute capability", "8.6, 8.9", "12.0"):
        machine.open()
    machine.cuda.capability = (8, 9)
    machine.engine.write_bytes(b"executable Content")
    with refused(ManifestError, machine.engine, "sha256"):
        machine.open()
    assert machine.trt.deserialised == []


def test_the_bytes_that_were_hashed_are_those_deserialised(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes once it has been read: nothing reads it again."""
    read_bytes = Path.read_bytes

    def read_and_change(path: Path) -> bytes:
        content = read_bytes(path)
        if path == machine.engine:
            path.write_bytes(b"somebody's content")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_change)
    machine.encoder().close()
    assert machine.trt.deserialised == [b"executable content"]
    # The control: what is there now is refused.
    with pytest.raises(ManifestError, match="sha256"):
        machine.open()
    assert len(machine.trt.deserialised) == 1


def test_the_plugin_library_is_loaded_before_the_engine(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = machine.engine.parent / "libmmvision_plugins-abc.so"
    record = EngineRecord.read(machine.engine)
    library.write_bytes(b"library")
    plugins = PluginFile(library.name, file_record(library))
    dataclasses.replace(
        record, attention=EngineAttention(way="plugin"), plugin_library=plugins
    ).write(machine.engine.with_suffix(".json"))
    loaded: list[tuple[Path, str]] = []

    def load(module: Any, path: Path, sha256: str) -> None:
        assert module.deserialised == []  # not a byte of the engine has been touched
        loaded.append((path, sha256))

    monkeypatch.setattr("mmvision_export.runtime.backends.tensorrt.load_plugin_library", load)
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
        assert len(machine.cuda.streams) == 2

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


class Tensor:
    """A device array of a library like torch, in the fake device's memory."""

    def __init__(self, cuda: Runtime, host: np.ndarray, device: int = 0) -> None:
        self.cuda, self.device = cuda, device
        self.shape, self.dtype = host.shape, host.dtype
        _, self.address = cuda.cudaMalloc(host.nbytes)
        cuda.region(self.address, host.nbytes)[:] = host.reshape(-1).view(np.uint8)
        self.asked_for: list[int] = []

    def numpy(self) -> np.ndarray:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        values: np.ndarray = (
            self.cuda.region(self.address, size).view(self.dtype).reshape(self.shape).copy()
        )
        return values

    def cpu(self) -> np.ndarray:
        return self.numpy()

    def new_empty(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        return Tensor(self.cuda, np.zeros(shape, dtype))

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int) -> Any:
        # NumPy's capsule of the same bytes, told that they are on a GPU.
        self.asked_for.append(stream)
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        capsule = (
            self.cuda.region(self.address, size).view(self.dtype).reshape(self.shape).__dlpack__()
        )
        tensor = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
        tensor.device.device_type, tensor.device.device_id = self.__dlpack_device__()
        return capsule


@pytest.mark.parametrize("own_stream", [False, True])
def test_device_arrays_go_in_and_out_without_the_host(
    machine: Machine, own_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.float16", np.float16, raising=False
    )  # what its library calls the type
    pixels, rows = batch([(1, 6, 8), (1, 2, 2), (1, 8, 10)] * 3, HEAD_DIM_80)
    half = pixels.astype(np.float16)
    with machine.encoder() as encoder:
        stream = Cuda(0, runtime=machine.cuda).new_stream() if own_stream else None
        patches, grid = Tensor(machine.cuda, half), Tensor(machine.cuda, rows)
        synchronised = machine.cuda.log.count("cudaStreamSynchronize")
        out = encoder(patches, grid, stream=stream)
        assert isinstance(out, Tensor)
        np.testing.assert_array_equal(
            out.numpy(), expected_embeds(half, HEAD_DIM_80.text_hidden_size)
        )
        assert patches.asked_for == [stream or 1]
        if own_stream and not encoder.info["cuda_graphs"]:
            assert machine.cuda.log.count("cudaStreamSynchronize") == synchronised


def test_host_arrays_in_a_stream_of_the_callers(machine: Machine) -> None:
    class Stream:
        cuda_stream = 0

    with machine.encoder() as encoder:
        Stream.cuda_stream = Cuda(0, runtime=machine.cuda).new_stream()
        pixels, rows = batch([(1, 6, 8)], HEAD_DIM_80)
        out = encoder(pixels, rows, stream=Stream())
        np.testing.assert_array_equal(
            out, expected_embeds(pixels.astype(np.float16), HEAD_DIM_80.text_hidden_size)
        )
        with refused(InputError, "stream", "str"):
            encoder(pixels, rows, stream="0")


def test_bad_device_arrays(machine: Machine) -> None:
    pixels, rows = batch([(1, 6, 8)], HEAD_DIM_80)
    with machine.encoder() as encoder:
        elsewhere = Tensor(machine.cuda, pixels.astype(np.float16), device=1)
        with refused(InputError, "CUDA device 1", 0):
            encoder(elsewhere, rows)
        with refused(InputError, "pixel_values", "float16", "float32"):
            encoder(Tensor(machine.cuda, pixels), rows)
        with refused(InputError, "pixel_values", "[num_patches, 1176]", [48, 8]):
            encoder(Tensor(machine.cuda, pixels.astype(np.float16)[:, :8]), rows)
        with refused(InputError, "grid_thw", 48, "pixel_values", 44):
            encoder(Tensor(machine.cuda, pixels.astype(np.float16)[:44]), rows)


def test_the_runtime_cache_is_kept_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmvision_export.runtime.backends.tensorrt.current_platform", lambda: "linux-x86_64"
    )
    machine = Machine(tmp_path, "tensorrt-rtx", BUCKETS)
    file = machine.engine.with_suffix(".rtxcache")
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
    assert [c.dynamic_shapes_kernel_specialization_strategy for c in machine.trt.configs] == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]
    assert all(config.cuda_graph_strategy == 1 for config in machine.trt.configs)
    with refused(BackendError, "kernels", "lazy, eager, none", "'fast'"):
        machine.open(kernels="fast")
    with machine.encoder(runtime_cache=tmp_path / "engine.engine" / "x") as encoder:
        pass  # cannot be written: the next process compiles again


def test_devices_are_counted(machine: Machine) -> None:
    with refused(BackendError, "CUDA device 1", 1):
        Cuda(1, runtime=machine.cuda)
    machine.cuda.devices = 0
    with refused(BackendError, "CUDA device 0", 0):
        Cuda(0, runtime=machine.cuda)


def test_a_missing_driver_is_an_error_and_not_a_crash() -> None:
    class NoDriver(Runtime):
        def cudaGetDeviceCount(self) -> tuple[int, int]:  # type: ignore[override]
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with refused(BackendError, "cudaGetDeviceCount", "dlopen"):
        Cuda(0, runtime=NoDriver())


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
