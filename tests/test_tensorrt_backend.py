"""The TensorRT backend, driven through a stand-in that enforces TensorRT's and CUDA's rules.

What a GPU computes has never been seen by these tests; that is for the test marked `gpu`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmvision_export.backends.cuda import Cuda
from mmvision_export.backends.tensorrt import TensorRTBackend, import_tensorrt, open_engine
from mmvision_export.compute_capability import current_compute_capability, parse_compute_capability
from mmvision_export.errors import BackendError, EngineError, InputError, ManifestError
from mmvision_export.preprocess import PreprocessorConfig
from mmvision_export.runtime import VisionEncoder
from tests.configs import GRIDS, HEAD_DIM_80, batch, relative_l2
from tests.fake_gpu import Runtime, TensorRT, expected_embeds
from tests.test_manifest import write_engine

LIMITS = {"pixel_values": (4, 256), "grid_thw": (1, 8)}


class Machine:
    """A fake GPU machine with one engine."""

    def __init__(self, folder: Path) -> None:
        self.cuda = Runtime()
        self.trt = TensorRT(self.cuda, HEAD_DIM_80.text_hidden_size, LIMITS)
        self.engine = write_engine(folder, config=HEAD_DIM_80)

    def open(self) -> TensorRTBackend:
        cuda = Cuda(0, runtime=self.cuda)
        return TensorRTBackend(self.engine, backend="tensorrt-rtx", trt=self.trt, cuda=cuda, manifest=None)

    def encoder(self) -> VisionEncoder:
        return VisionEncoder(self.open(), PreprocessorConfig())

    def holds_nothing(self) -> bool:
        return not self.cuda.memory and not self.cuda.streams


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("mmvision_export.backends.tensorrt.current_platform", lambda: "linux-x86_64")
    return Machine(tmp_path)


def test_batches_of_any_size(machine: Machine) -> None:
    with machine.encoder() as encoder:
        for grid in ([(1, 6, 8)], [(1, 2, 2)], [(1, 8, 8), (1, 8, 8)], [(1, 2, 2)] * 8):
            pixels, rows = batch(grid, HEAD_DIM_80)
            out = encoder(pixels, rows)
            assert out.dtype == np.float16
            np.testing.assert_array_equal(out, expected_embeds(pixels.astype(np.float16), HEAD_DIM_80.text_hidden_size))
        assert encoder.info["attention"] == "attention body, fused"
        assert encoder.info["max_patches"] == 256
    assert machine.holds_nothing()


def test_memory_is_reused(machine: Machine) -> None:
    with machine.encoder() as encoder:
        pixels, rows = batch([(1, 8, 8)], HEAD_DIM_80)
        encoder(pixels, rows)
        before = machine.cuda.log.count("cudaMalloc")
        for _ in range(10):
            encoder(pixels, rows)
        encoder(*batch([(1, 2, 2)], HEAD_DIM_80))
        assert machine.cuda.log.count("cudaMalloc") == before


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([(1, 16, 18)], r"288 patches \(72 image tokens\), the engine takes 4 to 256 \(64 image tokens\)"),
        ([(1, 2, 2)] * 9, "9 images, the engine takes at most 8"),
    ],
)
def test_beyond_the_profile(machine: Machine, grid: list[tuple[int, int, int]], message: str) -> None:
    with machine.encoder() as encoder, pytest.raises(InputError, match=message):
        encoder(*batch(grid, HEAD_DIM_80))


@pytest.mark.parametrize(
    "call", ["deserialize_cuda_engine", "create_execution_context", "set_optimization_profile_async"]
)
def test_failing_to_open_frees_everything(machine: Machine, call: str) -> None:
    machine.trt.fail = call
    with pytest.raises(BackendError, match=f"TensorRT could not .*: reason of {call}"):
        machine.open()
    assert machine.holds_nothing()


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_failing_to_run_is_an_error_and_not_the_end(machine: Machine, call: str) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with machine.encoder() as encoder:
        machine.trt.fail = call
        with pytest.raises(BackendError, match=f"reason of {call}"):
            encoder(pixels, rows)
        machine.trt.fail = None
        encoder(pixels, rows)
    assert machine.holds_nothing()


@pytest.mark.parametrize("call", ["cudaStreamCreate", "cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_cuda_errors_are_named_and_free_everything(machine: Machine, call: str) -> None:
    machine.cuda.fail = call
    with pytest.raises(BackendError, match=f"{call} failed with cudaErrorMemoryAllocation: out of memory"):
        with machine.encoder() as encoder:
            encoder(*batch(GRIDS["three"], HEAD_DIM_80))
    assert machine.holds_nothing()


def test_a_second_failure_while_freeing_does_not_hide_the_first(machine: Machine) -> None:
    machine.trt.fail = "create_execution_context"
    machine.cuda.fail = "cudaStreamDestroy"
    with pytest.raises(BackendError, match="reason of create_execution_context"):
        machine.open()


def test_closed(machine: Machine) -> None:
    encoder = machine.encoder()
    encoder.close()
    encoder.close()
    with pytest.raises(BackendError, match="closed"):
        encoder(*batch(GRIDS["three"], HEAD_DIM_80))


def test_a_foreign_engine_is_never_deserialised(machine: Machine) -> None:
    machine.cuda.capability = (12, 0)
    with pytest.raises(ManifestError, match=r"built for compute capability 8\.6, 8\.9, this GPU has 12\.0"):
        machine.open()
    machine.cuda.capability = (8, 9)
    machine.engine.write_bytes(b"executable Content")
    with pytest.raises(ManifestError, match="sha256"):
        machine.open()
    assert machine.trt.deserialised == []


def test_devices_are_counted(machine: Machine) -> None:
    with pytest.raises(BackendError, match="there is no CUDA device 1: this machine has 1"):
        Cuda(1, runtime=machine.cuda)
    machine.cuda.devices = 0
    with pytest.raises(BackendError, match="there is no CUDA device 0: this machine has 0"):
        Cuda(0, runtime=machine.cuda)


def test_a_missing_driver_is_an_error_and_not_a_crash() -> None:
    class NoDriver(Runtime):
        def cudaGetDeviceCount(self) -> tuple[int, int]:  # type: ignore[override]
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(BackendError, match="cudaGetDeviceCount failed: Failed to dlopen"):
        Cuda(0, runtime=NoDriver())


def test_a_folder_named_tensorrt_is_not_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", __import__("types").ModuleType("tensorrt"))
    with pytest.raises(BackendError, match="tensorrt is not installed"):
        import_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("89", "8.9"),
        ("8.9", "8.9"),
        ("sm_89", "8.9"),
        ("SM120", "12.0"),
        ("12.0", "12.0"),
        ("100", "10.0"),
        (" 7.5 ", "7.5"),
    ],
)
def test_compute_capabilities(text: str, expected: str) -> None:
    assert parse_compute_capability(text) == expected


@pytest.mark.parametrize("text", ["", "8", "ada", "8.9a", "-8.9", "8,9"])
def test_bad_compute_capabilities(text: str) -> None:
    with pytest.raises(EngineError, match="not a compute capability"):
        parse_compute_capability(text)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engine_on_a_gpu(backend: str, exported: Path, tmp_path: Path) -> None:
    """Never run so far: build for this GPU, run, and compare with ONNX Runtime on the CPU."""
    from mmvision_export.engine import build_engine
    from mmvision_export.sidecar import Profile
    from tests.configs import copy_of

    assert current_compute_capability() is not None, "no CUDA GPU"
    try:
        import_tensorrt(backend)
    except BackendError as error:
        pytest.skip(str(error))
    directory = copy_of(exported, tmp_path / "m")
    profile = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=32)
    build_engine(directory, profile=profile, precision="fp16", backend=backend)
    engine = open_engine(directory, backend=backend, device=0)
    with (
        VisionEncoder(engine, PreprocessorConfig()) as gpu,
        VisionEncoder.open(directory, backend="onnxruntime-cpu") as cpu,
    ):
        for grid in GRIDS.values():
            assert relative_l2(gpu(*batch(grid, HEAD_DIM_80)), cpu(*batch(grid, HEAD_DIM_80))) < 5e-3
