"""No package that we load calls home: no socket, no host looked up, no file in home or cache.

ONNX Runtime's wheel does so from native code, hence the library that is preloaded into each
process; OpenVINO's from Python, whenever it is imported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.support.configs import GRIDS, HEAD_DIM_80, batch
from tests.support.network import network_watch, watched

# ONNX Runtime 1.32 opens its first socket 9 seconds after it is loaded.
_DELAY_S = 14

_ENCODER = """
import sys, time
import numpy as np
from mmvision_export import VisionEncoder
with VisionEncoder.open(sys.argv[1], backend=sys.argv[4]) as encoder:
    encoder(np.load(sys.argv[2]), np.load(sys.argv[3]))
    time.sleep(float(sys.argv[5]))
"""

_RUN = """
import sys, time
from mmvision_export.run import main
model, pixels, grid, backend, delay = sys.argv[1:]
sys.argv[1:] = ["--model", model, "--pixel-values", pixels, "--grid-thw", grid]
sys.argv += ["--backend", backend]
main()
time.sleep(float(delay))
"""

_PARITY = """
import sys, time
from mmvision_export.cli.app import main
model, delay = sys.argv[1], float(sys.argv[5])
sys.argv[1:] = ["parity", "--model", model]
try:
    main()
finally:
    time.sleep(delay)
"""

_PROGRAMS = {"VisionEncoder": _ENCODER, "run": _RUN, "parity": _PARITY}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network_watch(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="module")
def arguments(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("batch")
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "grid.npy", rows)
    return [exported, folder / "pixels.npy", folder / "grid.npy"]


@pytest.mark.parametrize(
    "backend", ["onnxruntime-cpu", pytest.param("openvino", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("program", _PROGRAMS)
def test_nothing_is_written_or_called(
    program: str, backend: str, library: Path, arguments: list[Path]
) -> None:
    seen = watched(library, _PROGRAMS[program], *arguments, backend, "0")
    assert seen.code == 0, seen.err
    assert seen.calls == []
    assert seen.files == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("program", _PROGRAMS)
def test_nothing_is_called_later(
    program: str, backend: str, library: Path, arguments: list[Path]
) -> None:
    seen = watched(library, _PROGRAMS[program], *arguments, backend, str(_DELAY_S))
    assert seen.code == 0, seen.err
    assert seen.calls == []
    assert seen.files == []


def _needs_a_wheel_that_calls_home() -> None:
    folder = Path(onnxruntime.__file__).parent / "capi"
    if not any(b"ORT_DISABLE_TELEMETRY" in file.read_bytes() for file in folder.glob("*.so")):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} has no telemetry")


def test_what_onnxruntime_writes_is_seen(library: Path, arguments: list[Path]) -> None:
    """The control for files: what the wheel does where its telemetry is asked for."""
    _needs_a_wheel_that_calls_home()
    asked = [("ORT_DISABLE_TELEMETRY", "0")]
    seen = watched(library, _ENCODER, *arguments, "onnxruntime-cpu", "0", environment=asked)
    assert seen.code == 0, seen.err
    assert any("Microsoft" in file for file in seen.files)


@pytest.mark.slow
def test_what_onnxruntime_calls_is_seen(library: Path, arguments: list[Path]) -> None:
    """The control for native calls."""
    _needs_a_wheel_that_calls_home()
    asked = [("ORT_DISABLE_TELEMETRY", "0")]
    delay = str(_DELAY_S)
    seen = watched(library, _ENCODER, *arguments, "onnxruntime-cpu", delay, environment=asked)
    assert seen.code == 0, seen.err
    assert any("microsoft.com" in call for call in seen.calls)


def test_what_openvino_calls_is_seen(library: Path) -> None:
    """The control for OpenVINO: what it does when it is imported as it is."""
    seen = watched(library, "import openvino, time; time.sleep(2)")
    assert seen.code == 0, seen.err
    assert any("google-analytics" in call for call in seen.calls)
    assert any("intel" in file for file in seen.files)


def test_what_python_calls_is_seen(library: Path) -> None:
    """The control for Python's own sockets."""
    seen = watched(library, "import socket; socket.create_connection(('example.com', 80))")
    assert seen.code != 0
    assert seen.calls == ["getaddrinfo example.com"]
