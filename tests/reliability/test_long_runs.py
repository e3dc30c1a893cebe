"""Memory, handles and threads stay as they are over many batches; forks and closing are errors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import BackendError
from tests.support.configs import GRIDS, HEAD_DIM_80, batch

_ROOT = Path(__file__).parents[2]
_BACKENDS = ("onnxruntime-cpu", "openvino")
_FORK = """
import os, signal, sys
from mmvision_export import VisionEncoder
from tests.support.configs import GRIDS, HEAD_DIM_80, batch
directory, backend, action = sys.argv[1:]
encoder = VisionEncoder.open(directory, backend=backend, threads=2)
pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
encoder(pixels, rows)
child = os.fork()
if child == 0:
    signal.alarm(20)
    if action == "close":
        encoder.close()
    elif action == "encode":
        encoder(pixels, rows)
    sys.exit(0)  # Python frees what it has, the encoder too
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
encoder(pixels, rows)
sys.exit(code)
"""


def samples(*options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.reliability.soak", *options]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def growth_bytes_per_batch(found: list[dict[str, Any]]) -> float:
    """From the second half on: what a runtime keeps for reuse it has by then."""
    middle, end = found[len(found) // 2], found[-1]
    grown = (end["resident_mib"] - middle["resident_mib"]) * 2**20
    return float(grown / (end["batches"] - middle["batches"]))


# The smallest array of a batch, one image of 4 patches, has 4 * 1176 * 4 bytes.
_SMALLEST = 4 * 1176 * 4


def is_flat(found: list[dict[str, Any]]) -> bool:
    last = found[len(found) // 2 :]
    same = all(len({each[name] for each in last}) == 1 for name in ("threads",))
    handles = [each["handles"] for each in last]
    # The video's file is open or not at the moment of the sample.
    return same and max(handles) - min(handles) <= 2 and growth_bytes_per_batch(found) < _SMALLEST


def test_a_short_soak() -> None:
    assert is_flat(samples("--batches", "1000"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", _BACKENDS)
def test_a_soak(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    # OpenVINO's products add up in an order that depends on the number of images.
    tolerance = "0" if backend == "onnxruntime-cpu" else "1e-5"
    found = samples("--batches", "3000", "--backend", backend, "--tolerance", tolerance)
    assert is_flat(found)
    assert found[-1]["videos"] > 1


def test_a_leak_is_seen() -> None:
    """The control."""
    assert not is_flat(samples("--batches", "1000", "--leak"))


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize("action", ["encode", "close", "exit"])
def test_a_fork_gets_an_error_and_ends(exported: Path, backend: str, action: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", _FORK, str(exported), backend, action]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == (1 if action == "encode" else 0), ended.stderr
    if action == "encode":
        assert "BackendError: process" in ended.stderr


@pytest.mark.parametrize("backend", _BACKENDS)
def test_closing_during_calls(exported: Path, backend: str) -> None:
    """Each call gives its result or says that the encoder is closed."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    for _ in range(5):
        outcomes = outcomes_of_closing(VisionEncoder.open(exported, backend=backend, threads=1))
        assert len(outcomes) == 80
        assert set(outcomes) <= {"result", "closed"}


def outcomes_of_closing(encoder: VisionEncoder) -> list[str]:
    """What four threads get of 20 calls each, of an encoder that is closed as they begin."""
    pixels, rows = batch(GRIDS["many"], HEAD_DIM_80)
    expected = encoder(pixels, rows)
    outcomes: list[str] = []
    begun = threading.Barrier(5)

    def call() -> None:
        begun.wait()
        for _ in range(20):
            try:
                assert np.array_equal(encoder(pixels, rows), expected)
                outcomes.append("result")
            except BackendError as error:
                outcomes.append("closed" if "closed" in str(error) else str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    encoder.close()
    for thread in threads:
        thread.join()
    return outcomes
