"""What all commands have in common: help, examples, values, quiet, JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mmvision_export.cli.app import app
from mmvision_export.cli.command import MmvisionCommand
from mmvision_export.core.install import install_command
from tests.support.command import Command
from tests.support.configs import copy_of

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OWN_HELP = {"run"}  # argparse's, because it runs without typer


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - OWN_HELP))
def test_help_shows_examples_and_what_each_value_is(name: str, mmvision: Command) -> None:
    shown = mmvision(name, "--help").out
    examples = shown.partition("\nExamples:\n")[2].strip().splitlines()
    assert examples
    for line in examples:
        words = line.split()
        assert words[:2] == ["mmvision", name]
        options = {
            option for parameter in COMMANDS[name].params for option in parameter.opts
        }  # what is shown can be typed
        assert {word for word in words if word.startswith("--")} <= options
    # A metavar of typer's own says a Python type: <str>, <int range>.
    assert not re.findall(r"--\S+ <(?:str|int|float|path|text|integer)[^|>]*>", shown)


@pytest.mark.parametrize(
    "given",
    [
        ["--image", "a", "b", "--force"],
        ["--image", "a", "--image", "b", "--force"],
        ["--force", "--image=a", "b"],
        ["--image", "a", "--force", "--image", "b"],
    ],
    ids=" ".join,
)
def test_an_option_takes_its_values_in_both_forms(given: list[str]) -> None:
    command = COMMANDS["parity"]
    assert isinstance(command, MmvisionCommand)
    context = command.make_context("parity", list(given))
    assert [str(path) for path in context.params["image"]] == ["a", "b"]
    assert context.params["force"] is True


def test_an_option_of_one_value_takes_no_second(mmvision: Command) -> None:
    """The control: only what may be repeated has several."""
    result = mmvision("parity", "--report", "a.html", "b.html")
    assert result.code == 2
    assert "b.html" in result.errors[0]


def test_compute_capabilities_in_both_forms() -> None:
    command = COMMANDS["build-engine"]
    for given in (
        ["--compute-capability", "8.9", "120"],
        ["--compute-capability", "89", "--compute-capability", "12.0"],
    ):
        context = command.make_context("build-engine", given)
        assert [str(each) for each in context.params["compute_capabilities"]] == ["8.9", "12.0"]


def test_quiet_prints_results_and_errors_only(mmvision: Command, tmp_path: Path) -> None:
    tiny = ("export", "--preset", "tiny", "--random-weights")
    loud = mmvision(*tiny, "--output", "loud")
    quiet = mmvision(*tiny, "--output", "quiet", "--quiet")
    assert (loud.code, quiet.code) == (0, 0)
    assert loud.err
    assert quiet.err == ""
    assert quiet.out.startswith("quiet: fp32 graph")
    assert mmvision(*tiny, "--output", "quiet", "--quiet").errors[0].startswith("error: quiet")


def test_doctor_as_json(mmvision: Command) -> None:
    found = json.loads(mmvision("doctor", "--json").out)
    assert found["kind"] == "doctor"
    assert int(found["machine"]["cores"].split()[0]) >= 1
    assert found["packages"]["numpy"]
    assert {row["name"] for row in found["backends"]} >= {"onnxruntime-cpu", "tensorrt-rtx"}
    assert found["missing"]  # this environment has no TensorRT
    for each in found["missing"]:
        assert each["to"]
        assert each["install"].startswith("pip install '")
    assert not [name for name in _keys(found) if " " in name]


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(name for each in value.values() for name in _keys(each))]
    return [name for each in value for name in _keys(each)] if isinstance(value, list) else []


def test_inspect_is_a_table_on_a_terminal(
    mmvision: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(exported, tmp_path / "m")
    assert json.loads(mmvision("inspect", str(directory)).out)["kind"] == "model directory"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table = mmvision("inspect", str(directory)).out
    assert "model directory" in table
    assert "{" not in table
    assert json.loads(mmvision("inspect", str(directory), "--json").out)["opset"] == 23


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmvision_export", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip()


def test_what_to_install_depends_on_where_the_code_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    assert install_command("cpu", checkout=site) == "pip install 'mmvision-export[cpu]'"
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    assert install_command("cpu", checkout=checkout) == f"pip install '{checkout}[cpu]'"
    monkeypatch.chdir(checkout)
    assert install_command("cpu", checkout=checkout) == "pip install '.[cpu]'"
