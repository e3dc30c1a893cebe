"""`python -m mmvision_export.run`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.run import main
from tests.configs import GRIDS, HEAD_DIM_80, batch, copy_of
from tests.test_preprocess import photographs


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> Path:
    """A folder with photographs, patches, and one model directory under engines/."""
    monkeypatch.chdir(tmp_path)
    copy_of(exported, tmp_path / "engines" / "small")
    for name, levels in photographs().items():
        Image.fromarray(levels).save(tmp_path / f"{name}.jpg")
    pixels, grid = batch(GRIDS["three"], HEAD_DIM_80)
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "g.npy", grid)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result: dict[str, Any] = json.loads(printed.out)
    return result


def test_photographs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(
        capsys, "--image", "astronaut.jpg", "coffee.jpg", "--output", "out.npy", "--backend", "onnxruntime-cpu"
    )
    tokens = np.load("out.npy")
    assert result["grid_thw"] == [[1, 36, 36], [1, 28, 42]]
    assert result["tokens_per_image"] == [324, 294]
    assert list(tokens.shape) == result["image_embeds"] == [618, 96]
    assert result["output"] == "out.npy"
    assert all(milliseconds > 0 for milliseconds in result["milliseconds"].values())
    with VisionEncoder.open("engines/small", backend="onnxruntime-cpu") as encoder:
        alone = encoder.encode_images([Image.open("coffee.jpg")])[0]
    np.testing.assert_allclose(tokens[324:], alone, atol=1e-5)


def test_patches(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--pixel-values", "x.npy", "--grid-thw", "g.npy", "--output", "out.npy")
    with VisionEncoder.open("engines/small") as encoder:
        np.testing.assert_array_equal(np.load("out.npy"), encoder(np.load("x.npy"), np.load("g.npy")))
    assert result["pixel_values"] == [48, 1176] or result["pixel_values"][1] == 1176


def test_with_no_options_at_all(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["inputs"] == ["test pattern, 448 x 448"]
    assert result["model"] == "engines/small"
    assert result["output"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nothing.jpg"], "nothing.jpg: no such file"),
        (["--image", "x.npy"], "x.npy: not an image"),
        (["--pixel-values", "nothing.npy", "--grid-thw", "g.npy"], "nothing.npy: no such file"),
        (["--pixel-values", "coffee.jpg", "--grid-thw", "g.npy"], "coffee.jpg: not a readable .npy file"),
        (["--pixel-values", "g.npy", "--grid-thw", "g.npy"], "pixel_values must be float32"),
        (["--pixel-values", "x.npy", "--grid-thw", "x.npy"], "grid_thw must be integers"),
        (["--pixel-values", "x.npy", "--grid-thw", "wrong.npy"], "adds up to 4 patches, but pixel_values has"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--backend", "tensorrt-rtx"], ""),
        (["--output", "out.txt"], "--output must end in .npy"),
        (["--output", "g.npy"], "g.npy already exists"),
        (["--output", "coffee.jpg/out.npy"], "cannot write"),
    ],
)
def test_errors(files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    np.save("wrong.npy", np.array([[1, 2, 2]]))
    before = sorted(files.rglob("*"))
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("model: ")]
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(lines) <= 2
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pixel-values", "x.npy"],
        ["--image", "a.jpg", "--pixel-values", "x.npy", "--grid-thw", "g.npy"],
        ["--threads", "0"],
        ["--backend", "openvino"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_pickle_in_an_npy_file_is_not_loaded(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("evil.npy", np.array([print], dtype=object), allow_pickle=True)
    assert main(["--pixel-values", "evil.npy", "--grid-thw", "g.npy"]) == 1
    assert "not a readable .npy file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"PK\x03\x04nonsense", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((\n      ", b""])
def test_malformed_npy(files: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    Path("bad.npy").write_bytes(content)
    assert main(["--pixel-values", "bad.npy", "--grid-thw", "g.npy"]) == 1
    assert "error: bad.npy: not a readable .npy file" in capsys.readouterr().err


def test_what_was_not_foreseen_is_one_error(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--threads", "99999999999"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 2
    with pytest.raises(Exception, match="."):
        main(["--threads", "99999999999", "--verbose"])


def test_force_replaces_the_output(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.npy").write_text("old")
    run(capsys, "--image", "coffee.jpg", "--output", "out.npy", "--force")
    assert np.load("out.npy").ndim == 2


def test_as_a_module(files: Path) -> None:
    command = [sys.executable, "-m", "mmvision_export.run", "--image", "chelsea.jpg", "--threads", "1"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout)["backend"]
