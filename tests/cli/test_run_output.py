"""What a run prints for people and for programs, and how images are named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export.run import main
from mmvision_export.runtime.backends import BackendOptions, open_backend
from mmvision_export.runtime.run_summary import engines_passed_over
from tests.support.configs import copy_of
from tests.support.images import photographs
from tests.support.videos import write_video

ON = ("--backend", "onnxruntime-cpu")
FRAMES = np.random.default_rng(0).integers(0, 255, (8, 56, 84, 3), dtype=np.uint8)


@pytest.fixture
def files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy_of(exported, tmp_path / "engines" / "small")
    for name, levels in photographs().items():
        Image.fromarray(levels).resize((112, 84)).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)


def test_a_terminal_gets_lines_and_a_pipe_gets_json(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--image", "coffee.jpg", *ON, "--output", "a.npy", "--force"]
    assert main(arguments) == 0
    piped = json.loads(capsys.readouterr().out)
    assert piped["kind"] == "run"
    assert "passed_over" not in piped
    on_a_terminal(monkeypatch)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows, width = piped["image_embeds"]
    assert f"image_embeds: {rows} x {width} float32" in lines
    assert lines[0].startswith("coffee.jpg: grid 1 x ")
    assert lines[-1] == "written: a.npy"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == piped.keys()


def test_no_key_has_a_blank(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def keys(content: Any) -> list[str]:
        if isinstance(content, dict):
            return [*content, *(key for value in content.values() for key in keys(value))]
        return (
            [key for value in content for key in keys(value)] if isinstance(content, list) else []
        )

    write_video(files / "v.mp4", FRAMES)
    for arguments in (["--image", "coffee.jpg"], ["--video", "v.mp4"]):
        assert main([*arguments, *ON, "--verbose"]) == 0
        found = keys(json.loads(capsys.readouterr().out))
        assert found
        assert not [key for key in found if " " in key]


def test_a_folder_on_a_terminal(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "photos").mkdir()
    (files / "coffee.jpg").rename("photos/coffee.jpg")
    Path("photos/notes.txt").write_text("no image")
    on_a_terminal(monkeypatch)
    assert main(["--image", "photos", *ON, "--output", "embeds"]) == 1
    printed = capsys.readouterr()
    assert "files: 1 encoded, 1 failed" in printed.out.splitlines()
    assert "notes.txt" in printed.err


def test_patterns_and_standard_input(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--image", "*.jpg", *ON]) == 0
    inputs = json.loads(capsys.readouterr().out)["inputs"]
    assert inputs == sorted(path.name for path in files.glob("*.jpg"))
    with pytest.raises(SystemExit) as stopped:
        main(["--image", "nothing*.jpg", *ON])
    assert stopped.value.code == 2
    assert "--image" in capsys.readouterr().err

    def reading(content: bytes) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr("sys.stdin", stdin)

    reading((files / "coffee.jpg").read_bytes())
    assert main(["--image", "-", *ON, "--output", "stdin.npy"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == ["-"]
    assert main(["--image", "coffee.jpg", *ON, "--output", "file.npy"]) == 0
    capsys.readouterr()
    np.testing.assert_array_equal(np.load("stdin.npy"), np.load("file.npy"))
    for content, word in ((b"", "nothing"), (b"no image", "standard input")):
        reading(content)
        assert main(["--image", "-", *ON]) == 1
        assert word in capsys.readouterr().err


def test_timestamps_stand_beside_a_videos_embeddings(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(files / "v.mp4", FRAMES)
    assert main(["--video", "v.mp4", *ON, "--output", "v.npy"]) == 0
    segments = json.loads(capsys.readouterr().out)["segments"]
    companion = json.loads(Path("v.npy.json").read_text())
    assert companion["timestamps"] == [segment["timestamps"] for segment in segments]
    assert companion["grid_thw"] == [segment["grid_thw"] for segment in segments]
    assert main(["--video", "v.mp4", *ON, "--output", "v.safetensors"]) == 0
    from safetensors import safe_open

    with safe_open("v.safetensors", "np") as file:
        assert json.loads(file.metadata()["timestamps"]) == companion["timestamps"]
    # A companion alone is what a killed run left. What is none is not replaced unasked.
    Path("v.npy").unlink()
    assert main(["--video", "v.mp4", *ON, "--output", "v.npy"]) == 0
    Path("v.npy").unlink()
    Path("v.npy.json").write_text('{"inputs": []}')
    assert main(["--video", "v.mp4", *ON, "--output", "v.npy"]) == 1
    assert "v.npy.json" in capsys.readouterr().err


def test_auto_takes_the_backend_that_takes_the_option(files: Path) -> None:
    opened = open_backend(Path("engines/small"), BackendOptions(flavour="cpu"))
    assert (opened.name, opened.info.graph) == ("onnxruntime-cpu", "model.cpu.onnx")
    opened.close()


def test_an_engine_that_does_not_run_is_told(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = Path("engines/small/plans")
    plans.mkdir()
    reason = {"tensorrt-rtx": "no engine fits this machine: a.engine: built elsewhere"}
    assert engines_passed_over({"passed_over": reason}) == [
        "tensorrt-rtx: no engine fits this machine: a.engine: built elsewhere"
    ]
    # One that is not installed, or has nothing to open, is no news.
    assert engines_passed_over({"passed_over": {"tensorrt": "tensorrt cannot be imported"}}) == []
    assert engines_passed_over({}) == []


def test_quiet_writes_no_note(files: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmvision_export.run", "--image", "coffee.jpg", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["inputs"] == ["coffee.jpg"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["mmvision_export.run", "--help"],
        ["mmvision_export.run", "--version"],
        ["mmvision_export", "run", "--help"],
        ["mmvision_export", "--help"],
        ["mmvision_export", "inspect", "--help"],
    ],
    ids=" ".join,
)
def test_help_that_cannot_be_written_is_an_error(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
