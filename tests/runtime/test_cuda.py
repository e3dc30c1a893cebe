"""The CUDA driver by ctypes, against its header and against the stand-in."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import BackendError
from mmvision_export.kernels.compile import plugins_root
from mmvision_export.kernels.headers import cuda_headers
from mmvision_export.runtime.backends import cuda_driver, cuda_versions
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM, Cuda, current_compute_capability
from mmvision_export.runtime.backends.cuda_driver import (
    LEAST_DRIVER,
    SIGNATURES,
    CudaDriver,
    NoGpuError,
)
from tests.support.fake_driver import (
    NO_DEVICE,
    STUB_LIBRARY,
    SUCCESS,
    FakeDriver,
    fake_driver,  # noqa: F401 - a fixture
    stand_in,  # noqa: F401 - a fixture
)
from tests.support.tools import tool

UNSUPPORTED, INVALIDATED, ISOLATION, IMPLICIT = 900, 901, 905, 906


def preprocessed(text: str, folder: Path) -> str:
    """A C file after the preprocessor, with cuda.h included."""
    source = folder / "names.c"
    source.write_text(f"#include <cuda.h>\n{text}")
    command = [tool("g++", "g++"), "-E", "-P", "-x", "c", f"-I{cuda_headers()}", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_symbols_and_arguments_are_those_of_the_header(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", preprocessed("", tmp_path))
    width = {"int": 4, "unsigned int": 4, "unsigned char": 1, "float": 4, "size_t": 8}
    width |= {"unsigned long long": 8, "cuuint64_t": 8, "CUdevice": 4, "CUdeviceptr": 8}
    # Of cuda.h of CUDA 13; drivers have the first version too, with the same arguments.
    renamed = {"cuEventElapsedTime": "cuEventElapsedTime_v2"}
    for symbol, types in SIGNATURES.items():
        name = renamed.get(symbol, symbol)
        found = re.search(rf"CUresult {name}\s?\(([^)]*)\)", text) or re.search(
            rf"CUresult {symbol}\s?\(([^)]*)\)", text
        )
        assert found is not None, symbol
        parameters = [re.sub(r"\bconst\b", "", p).strip() for p in found[1].split(",")]
        sizes = []
        for parameter in parameters:
            kind = parameter.rsplit(" ", 1)[0].strip()
            is_handle = re.fullmatch(
                r"CU(context|stream|event|graph|graphExec|module|function)", kind
            )
            is_pointer = "*" in parameter or is_handle is not None
            sizes.append(8 if is_pointer else width.get(kind, 4))  # the rest are enumerations
        assert [ctypes.sizeof(kind) for kind in types] == sizes, symbol


def test_the_plugin_library_looks_up_the_same_versions(tmp_path: Path) -> None:
    """Python asks for what cuda.h makes of the names in cuda_driver.cpp."""
    source = (plugins_root() / "common" / "cuda_driver.cpp").read_text()
    names = re.findall(r"MMVISION_SYMBOL\((cu\w+)\)", source)
    assert len(names) >= 13
    listed = preprocessed("\n".join(f"symbol {name};" for name in names), tmp_path)
    symbols = re.findall(r"symbol (\w+)", listed)
    assert set(symbols) != set(names)  # the header does rename
    for name, symbol in zip(names, symbols, strict=True):
        versions = [s for s in SIGNATURES if s.partition("_v")[0] == name]
        assert versions in ([], [symbol]), name
    # Drivers of CUDA 11.4 have these versions: no later ones come in by a newer header.
    assert [s for s in symbols if re.search(r"_v\d+$", s)] == [
        "cuCtxPushCurrent_v2",
        "cuCtxPopCurrent_v2",
    ]


def test_a_device_and_its_facts(fake_driver: FakeDriver) -> None:  # noqa: F811
    fake_driver.set_device(sm=87, is_integrated=True)
    cuda = fake_driver.cuda()
    assert cuda.compute_capability() == ComputeCapability(8, 7)
    assert (cuda.name(), cuda.is_integrated(), cuda.driver.version) == ("stand-in", True, 12060)
    assert cuda.memory_bytes() == 1 << 30
    described = cuda_versions.describe_driver(cuda)
    assert "for CUDA 12.6" in described
    assert "integrated, compute capability 8.7" in described
    assert fake_driver.holds_nothing()  # none of it needs a context
    cuda.use()
    assert fake_driver.held("contexts") == 1
    address = cuda.allocate(1000)
    assert cuda.free_bytes() == (1 << 30) - 1000
    cuda.free(address)
    cuda.close()
    cuda.close()
    assert fake_driver.holds_nothing()


def test_each_thread_takes_its_device(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    library = shutil.copy(stand_in, tmp_path / "two.so")
    driver = FakeDriver(Path(library), devices=2)
    devices = [driver.cuda(0), driver.cuda(1)]
    for cuda in devices:
        cuda.use()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(driver.is_current).result()
        with pytest.raises(BackendError, match="CUDA_ERROR_INVALID_CONTEXT"):
            pool.submit(devices[0].new_stream).result()
        pool.submit(devices[0].use).result()
        assert pool.submit(driver.is_current).result()
    with pytest.raises(BackendError) as caught:
        driver.cuda(2)
    assert "there is no CUDA device 2: this machine has 2" in str(caught.value)


def test_no_driver_too_old_a_driver_and_no_device_are_three_errors(
    fake_driver: FakeDriver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error() -> BackendError:
        with pytest.raises(BackendError) as caught:
            fake_driver.cuda()
        return caught.value

    with pytest.raises(NoGpuError) as caught:
        cuda_driver._loaded(["libcuda-that-is-not-there.so.1"])
    missing: BackendError = caught.value
    assert "libcuda-that-is-not-there.so.1" in str(missing)

    fake_driver.library.fakeSetDriverVersion(11030)
    old = error()
    assert "11.3" in str(old)
    assert "11.4" in str(old)
    assert not isinstance(old, NoGpuError)
    fake_driver.library.fakeSetDriverVersion(LEAST_DRIVER)

    fake_driver.fail("cuInit", NO_DEVICE)
    none = error()
    assert isinstance(none, NoGpuError)
    assert "CUDA_ERROR_NO_DEVICE" in str(none)
    fake_driver.fail("cuInit", SUCCESS)

    fake_driver.fail("cuDriverGetVersion", STUB_LIBRARY)
    stub = error()
    assert not isinstance(stub, NoGpuError)
    assert "stubs" in str(stub.hint)
    fake_driver.fail("cuDriverGetVersion", SUCCESS)
    assert len({e.hint for e in (missing, old, none, stub)}) == 4

    # Only where there is none does it say so.
    found: dict[str, Callable[[], Any]] = {"driver": lambda: CudaDriver(fake_driver.library)}
    monkeypatch.setattr(CudaDriver, "found", lambda: found["driver"]())
    assert current_compute_capability() == ComputeCapability(8, 9)
    fake_driver.fail("cuInit", NO_DEVICE)
    assert current_compute_capability() is None
    fake_driver.fail("cuInit", SUCCESS)
    fake_driver.library.fakeSetDriverVersion(11030)
    with pytest.raises(BackendError):
        current_compute_capability()


def test_a_library_without_a_function_is_a_driver_too_old(tmp_path: Path) -> None:
    source = tmp_path / "old.c"
    source.write_text(
        "int cuInit(unsigned f) {return 0;} int cuDriverGetVersion(int* v) {*v = 12000; return 0;}"
    )
    library = tmp_path / "old.so"
    subprocess.run(
        [tool("g++", "g++"), "-xc", "-shared", "-fPIC", source, "-o", library], check=True
    )
    with pytest.raises(BackendError) as caught:
        CudaDriver(ctypes.CDLL(str(library)))
    assert "has no cu" in str(caught.value)


def test_a_tensorrt_of_a_later_cuda_is_refused(
    fake_driver: FakeDriver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_versions, "tensorrt_cuda", lambda backend: ("tensorrt-cu13", 13))
    with pytest.raises(BackendError) as caught:
        cuda_versions.refuse_newer_cuda(fake_driver.cuda(), "tensorrt")
    assert "12.6" in str(caught.value)
    assert "tensorrt-cu12" in str(caught.value.hint)
    fake_driver.library.fakeSetDriverVersion(13000)
    cuda_versions.refuse_newer_cuda(fake_driver.cuda(), "tensorrt")


@pytest.fixture
def cuda(fake_driver: FakeDriver) -> Cuda:  # noqa: F811
    device = fake_driver.cuda()
    device.use()
    return device


def test_copies_are_done_when_somebody_waits(cuda: Cuda) -> None:
    """A host array that changes before its copy is done is copied as it is then.

    The fault this stand-in is for.
    """
    stream = cuda.new_stream()
    memory = cuda.allocate(16)
    given, kept, back = np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.zeros(4, np.int32)
    cuda.to_device(memory, given, stream)
    cuda.to_host(back, memory, stream)
    kept[:] = given
    given[:] = -1
    assert not back.any()
    cuda.synchronize(stream)
    assert back.tolist() == [-1] * 4
    # Pinned or not, kept as it is it arrives.
    cuda.to_device(memory, kept, stream)
    cuda.to_host(back, memory, stream)
    cuda.synchronize(stream)
    assert back.tolist() == [0, 1, 2, 3]


def test_streams_wait_only_for_events(cuda: Cuda) -> None:
    writer, reader = cuda.new_stream(), cuda.new_stream()
    memory, done = cuda.allocate(4), cuda.new_event()
    value, back = np.array([7], np.int32), np.zeros(1, np.int32)
    cuda.to_device(memory, value, writer)
    cuda.to_host(back, memory, reader)
    cuda.synchronize(reader)
    assert back[0] == -1  # what was never written
    cuda.record(done, writer)
    cuda.wait(reader, done)
    cuda.to_host(back, memory, reader)
    cuda.synchronize(reader)
    assert back[0] == 7


def test_the_default_stream_waits_for_blocking_streams_alone(
    fake_driver: FakeDriver,  # noqa: F811
    cuda: Cuda,
) -> None:
    done: list[str] = []
    blocking = cuda.driver.new("cuStreamCreate", 0)
    for stream, name in ((blocking, "blocking"), (cuda.new_stream(), "other")):
        fake_driver.launch_work(lambda name=name: done.append(name), [], stream)  # type: ignore[misc]
    fake_driver.launch_work(lambda: done.append("default"), [], LEGACY_STREAM)
    cuda.synchronize(0)
    assert done == ["blocking", "default"]


def test_errors_of_work_appear_when_waiting_and_once(
    fake_driver: FakeDriver,  # noqa: F811
    cuda: Cuda,
) -> None:
    stream = cuda.new_stream()
    memory = cuda.allocate(4)
    cuda.zero(memory + 1, 4, stream)
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.synchronize(stream)
    cuda.synchronize(stream)
    assert fake_driver.broken_rules() == ["what is no device memory was filled"]


def test_memory_in_use_is_not_freed(fake_driver: FakeDriver, cuda: Cuda) -> None:  # noqa: F811
    stream = cuda.new_stream()
    memory, pinned = cuda.allocate(4), cuda.allocate_pinned(4)
    array = np.ctypeslib.as_array((ctypes.c_int32 * 1).from_address(pinned))
    cuda.to_device(memory, array, stream)
    for free, address in ((cuda.free, memory), (cuda.free_pinned, pinned)):
        with pytest.raises(BackendError):
            free(address)
    assert fake_driver.broken_rules() == [
        "device memory was freed that queued work uses",
        "pinned memory was freed that queued work uses",
    ]
    cuda.synchronize(stream)
    cuda.free(memory)
    cuda.free_pinned(pinned)
    with pytest.raises(BackendError):
        cuda.free(memory)
    assert fake_driver.broken_rules() == ["device memory was freed that was not allocated"]


@pytest.mark.parametrize(
    ("rule", "result"),
    [
        ("allocate", "UNSUPPORTED"),
        ("free", "UNSUPPORTED"),
        ("synchronize", "UNSUPPORTED"),
        ("foreign event", "ISOLATION"),
        ("refused", "UNSUPPORTED"),
        ("none", ""),
    ],
)
def test_what_a_capture_forbids(
    fake_driver: FakeDriver,  # noqa: F811
    cuda: Cuda,
    rule: str,
    result: str,
) -> None:
    stream, other = cuda.new_stream(), cuda.new_stream()
    memory, event = cuda.allocate(4), cuda.new_event()
    cuda.record(event, other)
    steps: dict[str, Callable[[], object]] = {
        "allocate": lambda: cuda.allocate(16),
        "free": lambda: cuda.free(memory),
        "synchronize": lambda: cuda.synchronize(stream),
        "foreign event": lambda: cuda.wait(stream, event),
        "refused": fake_driver.refuse_captures,
        "none": lambda: cuda.zero(memory, 4, other),  # another stream's work is its own affair
    }

    def enqueue() -> None:
        steps[rule]()
        cuda.zero(memory, 4, stream)

    if rule == "none":
        graph = cuda.captured(enqueue, stream)
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert not fake_driver.region(memory, 4).any()
        return
    with pytest.raises(BackendError, match=f"CUDA_ERROR_STREAM_CAPTURE_{result}"):
        cuda.captured(enqueue, stream)
    # The capture has ended, and the stream goes on.
    fake_driver.refuse_captures(False)
    cuda.zero(memory, 4, stream)
    cuda.synchronize(stream)
    assert fake_driver.held("graphs") == 0


def test_a_capture_broken_by_work_that_nobody_checks_gives_no_graph(cuda: Cuda) -> None:
    stream = cuda.new_stream()
    memory = cuda.allocate(4)

    def enqueue() -> None:
        cuda.driver._function("cuMemAlloc_v2")(ctypes.c_void_p(), 4)
        cuda.driver._function("cuMemsetD8Async")(memory, 0, 4, stream)

    with pytest.raises(BackendError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        cuda.captured(enqueue, stream)


def test_events_measure_time(cuda: Cuda) -> None:
    stream = cuda.new_stream()
    first, last = cuda.new_event(timing=True), cuda.new_event(timing=True)
    cuda.record(first, stream)
    cuda.record(last, stream)
    with pytest.raises(BackendError):
        cuda.elapsed_ms(first, last)
    cuda.wait_here(last)
    assert cuda.elapsed_ms(first, last) >= 0
    with pytest.raises(BackendError):
        cuda.elapsed_ms(first, cuda.new_event())
