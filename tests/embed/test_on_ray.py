"""The same tables on Ray, whoever is killed on the way."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.command import Command
from tests.support.embedding import cells_of, failures_of, images_in

pytest.importorskip("pyarrow")
pytest.importorskip("ray")

_WAIT_S = 120


def start(folder: Path, output: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmvision_export", "embed", "--input", str(folder)]
    command += ["--output", str(output), "--model", str(model), "--rows-per-part", "4"]
    command += ["--threads", "1", "--dtype", "float32", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts_in(output: Path) -> int:
    return len(list(output.glob("embeddings/*.parquet")))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "_Worker" in "".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_actor_and_the_driver_are_killed_and_every_row_is_there_once(
    tmp_path: Path, exported: Path, count: int
) -> None:
    folder = images_in(tmp_path / "in", count)
    (folder / "bad.png").write_bytes(b"")
    whole, output = tmp_path / "whole", tmp_path / "out"
    process = start(folder, whole, exported)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1, said  # for bad.png
    total = parts_in(whole)

    process = start(folder, output, exported, "--workers", "2")
    wait_until(lambda: parts_in(output) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    actors = actors_of(process)
    assert actors
    actors[0].kill()
    before = parts_in(output)
    wait_until(lambda: parts_in(output) >= before + 4, process)  # the run goes on
    process.kill()
    process.communicate()
    assert 6 <= parts_in(output) < total
    assert cells_of(output).items() <= cells_of(whole).items()
    # What Ray had started ends with the driver.
    _, alive = psutil.wait_procs(family, timeout=_WAIT_S)
    assert alive == []

    process = start(folder, output, exported, "--workers", "2")
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1, said
    assert cells_of(output) == cells_of(whole)
    assert len(cells_of(output)) == count
    assert failures_of(output) == failures_of(whole)


def test_what_a_worker_refuses_is_one_error(tmp_path: Path, exported: Path) -> None:
    folder = images_in(tmp_path / "in", 2)
    process = start(folder, tmp_path / "out", exported, "--workers", "1", "--backend", "tensorrt")
    _, said = process.communicate(timeout=_WAIT_S)
    assert process.returncode == 1
    assert "error: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_without_ray_the_error_says_what_to_install(
    mmvision: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = images_in(tmp_path / "in", 1)
    command = ["embed", "--input", str(folder), "--output", "out", "--model", str(exported)]
    result = mmvision(*command, "--workers", "1")
    assert result.code == 1
    assert "[ray]" in result.errors[1]
