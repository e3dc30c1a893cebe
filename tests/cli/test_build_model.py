"""`mmvision build`: three commands in one, and what is there is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.core.errors import ParityError
from mmvision_export.models.minimax_m3_vl.config import PRESETS
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80

BUILD = ["build", "--preset", "tiny", "--random-weights", "--output", "m"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", HEAD_DIM_80)


def steps(result: Any) -> dict[str, str | None]:
    """What was kept, by step."""
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["kind"], found["model"]) == ("build", "m")
    return {step["step"]: step["kept"] for step in found["steps"]}


def test_on_a_cpu_and_once_more(mmvision: Command, tmp_path: Path) -> None:
    dry = mmvision(*BUILD, "--target", "cpu", "--dry-run", "--json")
    assert steps(dry) == {"export": None, "parity": None}
    assert not Path("m").exists()
    assert steps(mmvision(*BUILD, "--target", "cpu", "--json")) == {"export": None, "parity": None}
    manifest = Manifest.read(Path("m"))
    assert manifest.parity[GRAPH]["passed"]
    again = mmvision(*BUILD, "--target", "cpu", "--json")
    assert all(steps(again).values())
    assert Manifest.read(Path("m")) == manifest
    other = mmvision(*BUILD, "--target", "cpu", "--seed", "1")
    assert other.code == 1
    assert "holds another model" in other.errors[0]


def test_an_engine_and_once_more(mmvision: Command, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = [*BUILD, "--fp16", "--target", "rtx", "--compute-capability", "8.9", "--buckets", "64"]
    assert steps(mmvision(*engine, "--json")) == dict.fromkeys(["export", "parity", "build-engine"])
    # The engine's own graph was compared before it was built.
    assert Manifest.read(Path("m")).parity["model.fp16.onnx"]["passed"]
    again = steps(mmvision(*engine, "--json"))
    assert "built from this graph for these sizes" in str(again["build-engine"])
    assert all(again.values())
    other = mmvision(*engine[:-1], "128")
    assert other.code == 1
    assert "built for other sizes" in other.errors[0]
    assert "64 patches" in other.errors[0]


def test_a_failure_says_where_to_go_on(
    mmvision: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ParityError("nothing can be compared", hint="install it")

    with monkeypatch.context() as patch:
        patch.setattr("mmvision_export.parity.check.check_parity", fail)
        failed = mmvision(*BUILD, "--target", "cpu")
    assert failed.code == 1
    assert (
        "install it; then run the same mmvision build again: it goes on at step 2/2 parity"
        in failed.err
    )
    kept = steps(mmvision(*BUILD, "--target", "cpu", "--json"))
    assert kept["export"] is not None
    assert kept["parity"] is None


def test_a_jetsons_engine_is_built_on_the_jetson(mmvision: Command, tmp_path: Path) -> None:
    result = mmvision(*BUILD, "--target", "jetson-orin", "--dry-run", "--json")
    assert "build-engine" not in steps(result)
    assert "copy m to the Jetson" in result.err


def test_options_of_the_plan_reach_the_engine(mmvision: Command, tmp_path: Path) -> None:
    given = "--workspace 512M --optimization-level 5 --hardware-compatible ampere-plus --refit"
    given += " --timing-cache t.cache --version-compatible --strip-weights --weight-streaming"
    result = mmvision(*BUILD, "--target", "dgpu", "--dry-run", "--json", *given.split())
    (step,) = [each for each in json.loads(result.out)["steps"] if each["step"] == "build-engine"]
    words = step["command"].split()
    assert sorted(words[words.index("--workspace") :]) == sorted(given.split())


@pytest.mark.parametrize(
    "options",
    [
        ["--target", "cpu", "--refit"],
        ["--workspace", "512"],
        ["--target", "cpu", "--fp16"],
        ["--fp16", "--fp32"],
        ["--checkpoint", "x"],
        ["--target", "phone"],
    ],
)
def test_what_does_not_go_together(mmvision: Command, tmp_path: Path, options: list[str]) -> None:
    assert mmvision(*BUILD, *options).code == 2
