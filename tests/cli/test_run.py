"""`python -m mmvision_export.run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.run import main
from tests.support.command import Command
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, copy_of
from tests.support.images import from_transformers, photographs


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
        capsys,
        "--image",
        "astronaut.jpg",
        "coffee.jpg",
        "--output",
        "out.npy",
        "--backend",
        "onnxruntime-cpu",
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


def test_images_named_together_or_one_by_one(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = ("--backend", "onnxruntime-cpu")
    names = ["astronaut.jpg", "coffee.jpg", "chelsea.jpg"]
    together = run(capsys, "--image", *names, "--output", "a.npy", *on)
    mixed = run(capsys, "--image", names[0], "--image", *names[1:], "--output", "b.npy", *on)
    assert together["inputs"] == mixed["inputs"] == names
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))


def test_sizes_by_another_rule(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ("--image", "coffee.jpg", "--backend", "onnxruntime-cpu")  # 600 x 400
    plain = run(capsys, *image)
    assert plain["grid_thw"] == [[1, 28, 42]]
    assert plain["resize"] == "area: 3136 to 451584 pixels"
    small = run(capsys, *image, "--resize", "long-side", "--max-long-side", "336")
    assert small["grid_thw"] == [[1, 16, 24]]
    assert small["resize"] == "long-side: at most 336 pixels"
    box = run(capsys, *image, "--resize", "box")
    assert box["grid_thw"] == [[1, 30, 44]]


def test_a_model_directory_keeps_its_rule(
    files: Path, mmvision: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ("export", "--preset", "tiny", "--random-weights", "--output", "m")
    refused = mmvision(*export, "--max-long-side", "1008")
    assert refused.code == 2
    assert "--resize long-side" in refused.err
    assert mmvision(*export, "--resize", "long-side", "--max-long-side", "100").code == 2
    assert not Path("m").exists()
    made = mmvision(*export, "--resize", "long-side", "--max-long-side", "336")
    assert made.code == 0, made.err
    image = ("--model", "m", "--image", str(files / "coffee.jpg"), "--backend", "onnxruntime-cpu")
    assert run(capsys, *image)["grid_thw"] == [[1, 16, 24]]
    assert run(capsys, *image, "--max-long-side", "224")["grid_thw"] == [[1, 10, 16]]
    assert run(capsys, *image, "--resize", "area")["grid_thw"] == [[1, 28, 42]]


def test_mmvision_run_is_this_command(
    files: Path, capsys: pytest.CaptureFixture[str], mmvision: Command
) -> None:
    arguments = ["--image", "coffee.jpg", "--backend", "onnxruntime-cpu", "--output"]
    expected = run(capsys, *arguments, "a.npy")
    done = mmvision("run", *arguments, "b.npy")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    for result in (expected, found):
        del result["milliseconds"], result["output"]
    assert found == expected
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    # Its errors are printed once, and its usage is its own.
    failed = mmvision("run", "--image", "nothing.jpg")
    assert (failed.code, len(failed.errors)) == (1, 1)
    usage = mmvision("run", "--nonsense")
    assert usage.code == 2
    assert "--nonsense" in usage.errors[0]
    assert usage.errors[1] == "hint: mmvision run --help"
    shown = mmvision("run", "--help")
    assert shown.code == 0
    assert shown.out.startswith("usage: mmvision run ")
    assert "--pixel-values" in shown.out


def test_patches(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--pixel-values", "x.npy", "--grid-thw", "g.npy", "--output", "out.npy")
    with VisionEncoder.open("engines/small") as encoder:
        np.testing.assert_array_equal(
            np.load("out.npy"), encoder(np.load("x.npy"), np.load("g.npy"))
        )
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
        (
            ["--pixel-values", "coffee.jpg", "--grid-thw", "g.npy"],
            "coffee.jpg: not a readable .npy file",
        ),
        (["--pixel-values", "g.npy", "--grid-thw", "g.npy"], "pixel_values must be float32"),
        (["--pixel-values", "x.npy", "--grid-thw", "x.npy"], "grid_thw must be integers"),
        (
            ["--pixel-values", "x.npy", "--grid-thw", "wrong.npy"],
            "adds up to 4 patches, but pixel_values has",
        ),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--backend", "tensorrt-rtx"], ""),
        (["--output", "out.txt"], "--output must end in .npy, .safetensors or .jsonl"),
        (["--output", "g.npy"], "g.npy already exists"),
        (["--output", "coffee.jpg/out.npy"], "cannot write"),
    ],
)
def test_errors(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
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
        ["--weight-budget", "500"],
        ["--backend", "coreml"],
        ["--nonsense"],
        ["--video", "v.mp4", "--image", "a.jpg"],
        ["--fps", "2"],
        ["--format", "npy", "--image", "a.jpg"],
        ["--resize-to-fit", "--pixel-values", "x.npy", "--grid-thw", "g.npy"],
        ["--image", "."],
        ["--image", ".", "--output", "x.npy"],
        ["--max-pixels", "0", "--image", "a.jpg"],
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_pickle_in_an_npy_file_is_not_loaded(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("evil.npy", np.array([print], dtype=object), allow_pickle=True)
    assert main(["--pixel-values", "evil.npy", "--grid-thw", "g.npy"]) == 1
    assert "not a readable .npy file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04nonsense", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((\n      ", b""]
)
def test_malformed_npy(files: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    Path("bad.npy").write_bytes(content)
    assert main(["--pixel-values", "bad.npy", "--grid-thw", "g.npy"]) == 1
    assert "error: bad.npy: not a readable .npy file" in capsys.readouterr().err


@pytest.mark.usefixtures("files")
def test_what_was_not_foreseen_is_one_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprising(*_: object, **__: object) -> None:
        raise RuntimeError("a library's own error")

    monkeypatch.setattr("mmvision_export.run.VisionEncoder.open", surprising)
    assert main([]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 2
    with pytest.raises(RuntimeError, match="a library's own error"):
        main(["--verbose"])


def test_force_replaces_the_output(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.npy").write_text("old")
    run(capsys, "--image", "coffee.jpg", "--output", "out.npy", "--force")
    assert np.load("out.npy").ndim == 2


def test_as_a_module(files: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mmvision_export.run",
        "--image",
        "chelsea.jpg",
        "--threads",
        "1",
    ]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout)["backend"]


def write_frames(path: Path, frames: int = 12) -> None:
    from tests.support.videos import moving, write_video

    write_video(path, moving(frames))


def folder_of_images(files: Path) -> Path:
    """Two photographs in two folders, with a file that is none and a hidden one."""
    pytest.importorskip("PIL")
    folder = files / "photos"
    (folder / "more").mkdir(parents=True)
    Image.open("coffee.jpg").resize((120, 80)).save(folder / "coffee.jpg")
    Image.open("chelsea.jpg").resize((90, 90)).save(folder / "more" / "chelsea.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_text("no image either")
    return folder


def run_folder(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[dict[str, Any]], str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_a_folder_streams_reports_failures_and_resumes(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_images(files)
    arguments = ("--image", "photos", "--output", "embeds", "--backend", "onnxruntime-cpu")
    code, lines, errors = run_folder(capsys, *arguments)
    assert code == 1
    assert [(line.get("status"), Path(line["input"]).name) for line in lines[:-1]] == [
        ("encoded", "coffee.jpg"),
        ("failed", "notes.txt"),
        ("encoded", "chelsea.png"),
    ]
    assert "notes.txt: not an image" in errors
    assert [line["kind"] for line in lines] == ["file", "file", "file", "folder"]
    assert lines[-1]["files"] == {"encoded": 2, "already_there": 0, "failed": 1, "passed_over": 0}
    with VisionEncoder.open("engines/small", backend="onnxruntime-cpu") as encoder:
        (alone,) = encoder.encode_images([Image.open(folder / "more" / "chelsea.png")])
    np.testing.assert_array_equal(np.load("embeds/more/chelsea.png.npy"), alone)

    (folder / "notes.txt").unlink()
    first = Path("embeds/coffee.jpg.npy").stat()
    code, lines, _ = run_folder(capsys, *arguments)
    assert code == 0
    assert lines[-1]["files"] == {"encoded": 0, "already_there": 2, "failed": 0, "passed_over": 0}
    again = Path("embeds/coffee.jpg.npy").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    # An image that is not what it was is encoded again, an older one too.
    os.utime(folder / "coffee.jpg", (first.st_mtime - 1000, first.st_mtime - 1000))
    _, lines, _ = run_folder(capsys, *arguments)
    assert lines[-1]["files"] == {"encoded": 1, "already_there": 1, "failed": 0, "passed_over": 0}
    _, lines, _ = run_folder(capsys, *arguments, "--force")
    assert lines[-1]["files"] == {"encoded": 2, "already_there": 0, "failed": 0, "passed_over": 0}


def test_embeddings_of_two_models_are_not_mixed(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of_images(files)
    arguments = ("--image", "photos", "--output", "embeds")
    run_folder(capsys, *arguments)
    identity = json.loads(Path("embeds/mmvision-run.json").read_text())
    Path("embeds/mmvision-run.json").write_text(json.dumps({**identity, "weights_sha256": "0"}))
    code, _, errors = run_folder(capsys, *arguments)
    assert code == 1
    assert "embeds holds embeddings of another run: weights_sha256 differs" in errors
    assert run_folder(capsys, "--image", "photos", "--output", "photos/out")[2].startswith(
        "error: photos/out lies in a folder of images"
    )
    assert (
        "is not a folder of embeddings"
        in run_folder(capsys, "--image", "photos", "--output", "engines")[2]
    )


@pytest.mark.parametrize("form", ["npy", "safetensors", "jsonl"])
def test_every_format_holds_the_same(
    files: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    from safetensors import safe_open

    result = run(
        capsys, "--pixel-values", "x.npy", "--grid-thw", "g.npy", "--output", f"out.{form}"
    )
    with VisionEncoder.open("engines/small") as encoder:
        expected = encoder(np.load("x.npy"), np.load("g.npy"))
    if form == "npy":
        found = np.load("out.npy")
    elif form == "safetensors":
        with safe_open("out.safetensors", "numpy") as file:
            found = file.get_tensor("image_embeds")
            np.testing.assert_array_equal(file.get_tensor("grid_thw"), np.load("g.npy"))
            assert json.loads(file.metadata()["inputs"])[0] == "x.npy, row 0"
    else:
        lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert [line["grid_thw"] for line in lines] == result["grid_thw"]
        found = np.concatenate([np.array(line["image_embeds"], np.float32) for line in lines])
    np.testing.assert_array_equal(found, expected)
    assert sorted(path.name for path in files.glob("*out*")) == [f"out.{form}"]


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_video(files: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    pytest.importorskip("av")
    write_frames(files / "v.mkv")
    result = run(
        capsys,
        "--video",
        "v.mkv",
        "--fps",
        "4",
        "--output",
        f"v.{form}",
        "--backend",
        "onnxruntime-cpu",
    )
    assert [segment["grid_thw"] for segment in result["segments"]] == [[4, 4, 6], [2, 4, 6]]
    assert result["segments"][1]["timestamps"] == [2.0, 2.5]
    assert result["image_embeds"] == [36, 96]
    if form == "npy":
        assert np.load("v.npy").shape == (36, 96)
    else:
        lines = [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()]
        assert [line["timestamps"] for line in lines] == [
            s["timestamps"] for s in result["segments"]
        ]


@pytest.mark.parametrize("module", [["mmvision_export.run"], ["mmvision_export.cli.entry", "run"]])
def test_interrupting_leaves_whole_files_only(files: Path, module: list[str]) -> None:
    folder = files / "photos"
    folder.mkdir()
    photo = Image.open("coffee.jpg")
    for index in range(200):
        photo.save(folder / f"{index:03}.jpg")
    command = [
        sys.executable,
        "-m",
        *module,
        "--image",
        "photos",
        "--output",
        "embeds",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if not line.startswith("model")] == [
        "error: interrupted; unfinished work is not kept"
    ]
    names = sorted(path.name for path in Path("embeds").iterdir())
    assert [name for name in names if not name.endswith(".jpg.npy")] == [
        "mmvision-run.json",
        "mmvision-run.records",
    ]
    assert 3 <= len(names) - 2 < 200
    for name in names[:-2]:
        assert np.load(f"embeds/{name}").ndim == 2


def test_a_killed_folder_run_is_resumed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_images(files)
    (files / "photos" / "notes.txt").unlink()
    command = [sys.executable, "-m", "mmvision_export.run", "--image", "photos", "--output", "e"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    code, lines, errors = run_folder(capsys, "--image", "photos", "--output", "e")
    assert code == 0, errors
    counts = lines[-1]["files"]
    assert counts["already_there"] >= 1
    assert counts["already_there"] + counts["encoded"] == 2


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed again and again, a run ends with what an undisturbed one gives."""
    folder = files / "photos"
    folder.mkdir()
    photo = Image.open("coffee.jpg").resize((240, 160))
    for index in range(200):
        photo.rotate(index).save(folder / f"{index:03}.jpg")
    on = ("--backend", "onnxruntime-cpu", "--image", "photos", "--output")
    code, _, errors = run_folder(capsys, *on, "whole")
    assert code == 0, errors
    generator = np.random.default_rng(15)
    kills = 0
    for _ in range(16):
        process = subprocess.Popen(
            [sys.executable, "-m", "mmvision_export.run", *on, "killed"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=generator.uniform(0.4, 1.0))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    code, _, errors = run_folder(capsys, *on, "killed")
    assert code == 0, errors
    for path in Path("whole").glob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(Path("killed", path.name)))
    assert len(list(Path("killed").glob("*.npy"))) == 200


@pytest.mark.slow
def test_a_photograph_of_24_megapixels(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The grids of transformers' and of SGLang's code, from the file to the embeddings."""
    Image.open("coffee.jpg").resize((6000, 4000)).save("large.jpg")
    on = ("--image", "large.jpg", "--backend", "onnxruntime-cpu")
    height, width = from_transformers("smart_resize")(4000, 6000, 28, 3136, 451584)
    area = run(capsys, *on)
    assert area["grid_thw"] == [[1, height // 14, width // 14]]
    long_side = run(capsys, *on, "--resize", "long-side")
    assert long_side["grid_thw"] == [[1, 1344 // 14, 2016 // 14]]
    for result in (area, long_side):
        assert all(result["milliseconds"][stage] > 0 for stage in ("open", "preprocess", "encode"))


def test_folders_with_files_of_one_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c1", "c2"):
        (files / name).mkdir()
        Image.new("RGB", (60, 60), "red").save(files / name / "x.png")
    code, lines, errors = run_folder(capsys, "--image", "c1", "c2", "--output", "embeds")
    assert (code, lines) == (1, [])
    assert "c1/x.png" in errors
    assert "c2/x.png" in errors
    assert not Path("embeds").exists()


def test_limits_and_drafts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on = ("--backend", "onnxruntime-cpu")
    assert main(["--image", "coffee.jpg", "--max-pixels", "239999", *on]) == 1
    assert "240000" in capsys.readouterr().err
    Image.open("coffee.jpg").resize((3000, 2000)).save("large.jpg")
    small = ("--image", "large.jpg", "--resize", "long-side", "--max-long-side", "224", *on)
    draft = run(capsys, *small, "--output", "a.npy")
    exact = run(capsys, *small, "--no-draft", "--output", "b.npy")
    assert draft["grid_thw"] == exact["grid_thw"]
    drafted, full = np.load("a.npy"), np.load("b.npy")
    assert not np.array_equal(drafted, full)
    with VisionEncoder.open(
        "engines/small", backend="onnxruntime-cpu", resize="long-side", max_long_side=224
    ) as encoder:
        (alone,) = encoder.encode_images([Image.open("large.jpg")])
    np.testing.assert_array_equal(full, alone)


def test_two_processes_share_a_model_directory(files: Path) -> None:
    """At once, into one folder of embeddings too."""
    folder_of_images(files)
    (files / "photos" / "notes.txt").unlink()
    command = [
        sys.executable,
        "-m",
        "mmvision_export.run",
        "--image",
        "photos",
        "--output",
        "embeds",
        "--threads",
        "1",
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        counts = json.loads(output.splitlines()[-1])["files"]
        assert counts["encoded"] + counts["already_there"] == 2
    assert len(list(Path("embeds").rglob("*.npy"))) == 2
    assert not list(Path("embeds").rglob("*.partial"))
