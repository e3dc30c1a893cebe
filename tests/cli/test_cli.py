"""The `mmvision` command as its users type it: output, exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import mmvision_export
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import DEFAULT_SLOTS, Profile
from mmvision_export.core.errors import ExportError
from mmvision_export.models.weights import WeightSource
from tests.support.checkpoints import LAYOUTS, STATE, write_checkpoint
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, copy_of

TINY = ["export", "--onnx", "--preset", "tiny", "--random-weights"]


def test_from_nothing_to_a_checked_model(mmvision: Command, tmp_path: Path) -> None:
    """export, parity, inspect, and the model directory found without being named."""
    exported = mmvision(*TINY, "--seed", "3")
    assert exported.code == 0, exported.err
    assert "engines/tiny: fp32 graph, opset 23" in exported.out
    assert sorted(p.name for p in (tmp_path / "engines" / "tiny").iterdir()) == [
        "manifest.json", "model.cpu.onnx", "model.onnx", "model.onnx.data", "model.uniform.onnx",
        "preprocessor_config.json",
    ]  # fmt: skip

    again = mmvision(*TINY)
    assert again.code == 1
    assert again.errors[0] == "error: engines/tiny already exists"
    assert "--force" in again.errors[1]

    parity = mmvision("parity")
    assert parity.code == 0, parity.err
    assert "model: engines/tiny" in parity.err
    assert "pass" in parity.out
    assert "FAIL" not in parity.out

    inspected = json.loads(mmvision("inspect", "engines/tiny").out)
    assert (inspected["source"]["preset"], inspected["source"]["seed"]) == ("tiny", 3)
    assert inspected["parity"]["model.onnx"]["passed"] is True
    assert inspected["graphs"]["model.onnx"]["operators"]["mmvision::VarlenAttention"] == 4
    assert inspected["graphs"]["model.onnx"]["inputs"]["grid_thw"] == "int64[num_images, 3]"
    assert (
        inspected["graphs"]["model.onnx"]["parameters"] == 7_047_552 + 13
    )  # and the rotary frequencies

    rows = json.loads(mmvision("parity", "--json").out)["rows"]
    assert {row["runner"] for row in rows} == {
        "pytorch-fp32", "model.onnx", "model.cpu.onnx",
        "model.uniform.onnx", "model.uniform.onnx (OpenVINO)",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--random-weights", "--preset", "tiny"], "plain"),
        (["--preset", "tiny", "--random-weights"], "plain"),
        (["--preset", "tiny", "--random-weights=plain"], "plain"),
        (["--preset", "tiny", "--random-weights=outliers"], "outliers"),
        (["--random-weights", "outliers", "--preset", "tiny"], "outliers"),
    ],
)
def test_kinds_of_random_weights(
    mmvision: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kind: str
) -> None:
    """The option's value may be left out, wherever it stands."""
    sources: list[WeightSource] = []

    def stop(source: WeightSource, *_: object, **__: object) -> None:
        sources.append(source)
        raise ExportError("far enough")

    monkeypatch.setattr("mmvision_export.export.onnx_export.export_model_directory", stop)
    assert mmvision("export", *arguments).errors == ["error: far enough"]
    assert sources == [
        WeightSource.random("tiny", 0, "outliers" if kind == "outliers" else "plain")
    ]


class Terminal:
    def isatty(self) -> bool:
        return True


def test_engine_from_the_command_line(
    mmvision: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    copy_of(exported, tmp_path / "engines" / "m")
    built = mmvision(
        "build-engine",
        "--fp16",
        "--compute-capability",
        "8.9",
        "--max-patches",
        "512",
        "--max-images",
        "9",
    )
    assert built.code == 0, built.err
    assert "fp16" in built.out
    assert "compute capability 8.9" in built.out
    (engine,) = (tmp_path / "engines/m/plans").glob("*.engine")
    inspected = json.loads(mmvision("inspect", str(engine)).out)
    assert inspected["profiles"] == [
        {
            "min_patches": 4,
            "opt_patches": 512,
            "max_patches": 512,
            "max_images": 9,
            "min_images": 1,
            "slots": None,
        }
    ]
    layers = json.loads(mmvision("inspect", "--layers", str(engine)).out)
    assert layers["fused_attention"] == HEAD_DIM_80.num_hidden_layers
    assert len(layers["layers"]) == layers["count"]
    assert f"  {layers['count']} layers: " in built.out
    with monkeypatch.context() as patch:
        patch.setattr("mmvision_export.cli.inspect.sys", SimpleNamespace(stdout=Terminal()))
        table = mmvision("inspect", "--layers", str(engine)).out
    assert f"{layers['count']} layers, {layers['fused_attention']} of fused attention" in table
    assert layers["report"] in table
    assert table.splitlines()[1].split()[:2] == ["kind", "layers"]
    assert mmvision("inspect", "--layers", "engines/m").code == 1
    options = ["--weight-streaming", "--workspace", "2G"]
    streaming = mmvision("build-engine", "--compute-capability", "8.9", "--no-check", *options)
    assert streaming.code == 0, streaming.err
    assert "options: workspace2g, streaming" in streaming.out
    again = mmvision("build-engine", "--fp16", "--compute-capability", "8.9", "--buckets", "512,16")
    assert again.code == 1
    assert "already exists" in again.errors[0]
    buckets = mmvision(
        "build-engine", "--fp16", "--compute-capability", "8.9", "--buckets", "512,16", "--force"
    )
    assert buckets.code == 0, buckets.err
    profiles = json.loads(mmvision("inspect", str(engine)).out)["profiles"]
    assert [(p["min_patches"], p["max_patches"], p["max_images"]) for p in profiles] == [
        (16, 16, 4),
        (512, 512, 9),
        (512, 512, 65),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["build-engine", "--buckets", "64,256"],
        ["build-engine", "--max-patches", "256"],
        ["quantize", "--int8"],
    ],
    ids=" ".join,
)
def test_the_manifest_is_read_once(
    mmvision: Command,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    """Up to where the files that it lists are verified."""
    if arguments[0] == "build-engine":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    copy_of(exported, tmp_path / "engines" / "m")
    read, reads = Manifest.read, []

    def counted(directory: Path) -> Manifest:
        reads.append(directory)
        return read(directory)

    def stop(*_: object, **__: object) -> None:
        raise ExportError("far enough")

    monkeypatch.setattr(Manifest, "read", counted)
    monkeypatch.setattr(Manifest, "verify", stop)
    assert mmvision(*arguments).errors[0] == "error: far enough"
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--buckets", "256,x"], 2, "--buckets must be sizes in patches"),
        (["--buckets", ""], 2, "--buckets must be sizes in patches"),
        (["--buckets", "256", "--max-patches", "512"], 2, "--buckets excludes"),
        (["--buckets", "256,2x256"], 2, "--buckets must be sizes in patches"),
        (["--buckets", "2x256", "--max-images", "8"], 2, "--max-images"),
        (["--buckets", "2x255"], 1, "a slot must be a positive multiple of 4 patches, got 255"),
        (["--buckets", "2x256", "--attention", "native"], 1, "--attention uniform"),
        (["--buckets", "256", "--attention", "uniform"], 1, "--buckets 1x1024,8x1024"),
        (["--max-patches", "256", "--attention", "equal"], 1, "--buckets 1x1024,8x1024"),
        (["--buckets", "255"], 1, "a bucket must be a positive multiple of 4 patches, got 255"),
    ],
)
def test_bad_buckets(
    mmvision: Command, exported: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    copy_of(exported, tmp_path / "engines" / "m")
    result = mmvision("build-engine", *arguments)
    assert result.code == code
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        (["--attention", "uniform", "--buckets", "2x64, 1x128"], [(1, 2, 128), (2, 4, 128)]),
        (["--attention", "equal", "--buckets", "3x64"], [(3, 3, 192)]),
        (["--buckets", "2x64"], [(2, 4, 128)]),
        (["--attention", "equal"], [(n, n, n * length) for n, length in DEFAULT_SLOTS]),
        (["--attention", "uniform"], [(n, 2 * n, n * length) for n, length in DEFAULT_SLOTS]),
        ([], [(None, 64, 4096)]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_slots_of_an_engine(
    mmvision: Command,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    slots: list[tuple[int | None, int, int]],
) -> None:
    copy_of(exported, tmp_path / "engines" / "m")
    found: list[Profile] = []

    def stop(*_: object, profiles: list[Profile], **__: object) -> None:
        found.extend(profiles)
        raise ExportError("far enough")

    monkeypatch.setattr("mmvision_export.engine.build.build_engine", stop)
    assert mmvision("build-engine", *arguments).errors[0] == "error: far enough"
    assert [(p.slots, p.max_images, p.max_patches) for p in found] == slots


def test_a_failed_parity_check_exits_with_1(
    mmvision: Command, exported: Path, tmp_path: Path
) -> None:
    from tests.support.faults import rewrite, scale_weights

    rewrite(copy_of(exported, tmp_path / "engines" / "m"), scale_weights)
    result = mmvision("parity")
    assert result.code == 1
    assert "FAIL" in result.out
    assert any("model.onnx, one image: relative L2" in line for line in result.errors)


def test_checkpoint_folder(mmvision: Command, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "minimax", LAYOUTS["released"](STATE))
    result = mmvision("export", "--onnx", "--checkpoint", "minimax")
    assert result.code == 0, result.err
    assert (tmp_path / "engines" / "minimax" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--checkpoint", "./nowhere"], "./nowhere: no such checkpoint folder"),
        (["export", "--checkpoint", "brackets[/red]"], "brackets[/red]: "),
        (["export", "--checkpoint", "./x.onnx"], "x.onnx: no such checkpoint folder"),
        (
            ["export", "--checkpoint", ".", "--revision", "main"],
            "is a folder, and a folder has no revision",
        ),
        ([*TINY, "--output", "x.onnx/sub"], "cannot write sub"),
        ([*TINY, "--opset", "17"], "opset must be between 18 and 23, got 17"),
        (["parity"], "no model directory under engines/"),
        (["build-engine", "--fp16", "--model", "nowhere"], "nowhere: no such model directory"),
        (["quantize", "--int8", "--model", "nowhere"], "nowhere: no such model directory"),
        (
            ["quantize", "--int8", "--calibration", "nowhere", "--model", "x"],
            "nowhere: no such folder",
        ),
        (["inspect", "nowhere"], "nowhere: no model directory, .onnx graph or .engine there"),
        (["inspect", "x.onnx"], "x.onnx: not a readable ONNX file"),
    ],
)
def test_errors_are_one_line(
    mmvision: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nonsense" * 99)
    result = mmvision(*arguments)
    assert result.code == 1
    assert message in result.errors[0]
    assert "Traceback" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--fp16", "--bf16"], "choose one of --fp16, --bf16"),
        ([*TINY, "--checkpoint", "x"], "--random-weights takes no --checkpoint"),
        (["export", "--preset", "tiny"], "--preset and --seed go with --random-weights"),
        ([*TINY, "--seed", "-1"], "--seed"),
        (["export", "--random-weights"], "--random-weights needs --preset tiny, shallow or full"),
        (["export", "--seed", "3"], "--preset and --seed go with --random-weights"),
        (["export", "--checkpoint", ""], "--checkpoint is empty"),
        (["export", "--preset", "huge", "--random-weights"], "huge"),
        (["export", "--preset", "tiny", "--random-weights=huge"], "huge"),
        (["export", "--preset", "tiny", "--random-weights", "huge"], "huge"),
        (["explode"], "explode"),
        (["quantize"], "choose one of --int8, --fp8, --cpu-int8"),
        (["quantize", "--int8", "--fp8"], "choose one of --int8, --fp8, --cpu-int8"),
        (
            ["quantize", "--int8", "--image", "a", "--calibration", "b"],
            "give either --image or --calibration",
        ),
        (["build-engine", "--int8", "--fp8"], "choose one of --int8, --fp8"),
        (["build-engine", "--compute-capability", "ada"], "'ada'"),
        (["build-engine", "--device", "-1"], "--device"),
        (["build-engine", "--workspace", "4096"], "'4096'"),
        (["build-engine", "--optimization-level", "6"], "--optimization-level"),
        (["build-engine", "--hardware-compatible", "hopper"], "hopper"),
        (["build-plugins", "--sm", "8"], "'8'"),
    ],
)
def test_wrong_usage_exits_with_2(mmvision: Command, arguments: list[str], message: str) -> None:
    result = mmvision(*arguments)
    assert result.code == 2
    assert message in result.errors[0]
    assert "--help" in result.errors[1]
    assert len(result.err.splitlines()) == 2


def test_verbose_shows_the_traceback(mmvision: Command) -> None:
    from mmvision_export.core.errors import CheckpointError

    with pytest.raises(CheckpointError):
        mmvision("export", "--checkpoint", "./nowhere", "--verbose")


def test_doctor_explains_every_backend(mmvision: Command) -> None:
    result = mmvision("doctor")
    assert result.code == 0
    for name in ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        assert f"\n{name}\n" in result.out
    assert "[gpu]'" in result.out  # hints keep their square brackets


def test_help_and_version(mmvision: Command) -> None:
    assert mmvision("--version").out.strip() == mmvision_export.__version__
    for command in ("export", "parity", "build-engine", "inspect", "doctor"):
        assert command in mmvision("--help").out
        assert mmvision(command, "--help").code == 0


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['mmvision', '--help']\n"
        "from mmvision_export.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'polygraphy', 'numpy.linalg') if m in sys.modules and "
        "m != 'numpy.linalg'], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert result.stderr.strip() == "[]"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for a disk with too little room for the weights."""
    result = subprocess.run(
        [sys.executable, "-m", "mmvision_export.cli.entry", *TINY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000)),
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "error: engines: no space left while writing tiny" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-m", "mmvision_export.cli.entry", *TINY]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "tracing" in line:
                break
        time.sleep(0.5)
        process.send_signal(signum)
        error = process.stderr.read()
    # Python 3.10 ends by SIGINT itself if an interrupt passed through exec().
    assert process.returncode in (128 + signum, -signal.SIGINT), error
    assert "error: interrupted" in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.onnx*"))


def test_cli_py_is_the_command() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "cli.py", "--version"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == mmvision_export.__version__


def test_missing_command_line_packages_are_named(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('not here', name='typer')")
    result = subprocess.run(
        [sys.executable, "-m", "mmvision_export.cli.entry", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: typer is not installed")


def test_doctor_says_what_auto_takes_and_why(mmvision: Command, exported: Path) -> None:
    result = mmvision("doctor", "--model", str(exported))
    assert result.code == 0, result.err
    for name in (
        "tensorrt",
        "tensorrt-rtx",
        "onnxruntime-rtx",
        "onnxruntime-tensorrt",
        "onnxruntime-cuda",
    ):
        assert f"\n{name}\n" in result.out
    assert "chosen: the first that works" in result.out
    missing = mmvision("doctor", "--model", "nowhere")
    assert missing.code == 1
    assert "none: nowhere: no such model directory" in missing.out
