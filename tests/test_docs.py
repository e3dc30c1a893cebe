"""Do the pages say what is so: links, commands, options, exit codes, the README's promises?"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mmvision_export.cli.app import app
from mmvision_export.core import command as core_command
from mmvision_export.runtime.run_arguments import _parser
from tests.support.markdown import anchors_in, broken_links, command_lines, links_in, pages_of

ROOT = Path(__file__).parents[1]
PAGES = pages_of(ROOT)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize(
    "broken",
    [
        "[a](missing.md)",
        "[a](#no-such-heading)",
        "![a](missing.png)",
        "[`a`](there.md#no-such-heading)",
        "[![a](there.md)](missing.md)",
    ],
)
def test_control_a_broken_link_is_found(tmp_path: Path, broken: str) -> None:
    (tmp_path / "there.md").write_text("# A heading: with `code`\n")
    page = tmp_path / "page.md"
    good = (
        "[a](there.md) [b](there.md#a-heading-with-code) [c](https://example.org/x.md) `[d](x)`\n"
    )
    page.write_text(f"{good}```\n[e](missing.md)\n```\n")
    assert broken_links(page) == []
    page.write_text(good + broken + "\n")
    assert len(broken_links(page)) == 1


def test_anchors_are_those_of_github() -> None:
    text = "# Ways of `attention`, and\n## On a Jetson\n## On a Jetson\n```\n# no heading\n```\n"
    assert anchors_in(text) == {"ways-of-attention-and", "on-a-jetson", "on-a-jetson-1"}


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {link.partition("#")[0] for link in links_in(index.read_text())}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= listed, pages - listed


def test_the_readme_is_a_screen_and_a_half_and_says_first_that_no_gpu_has_run_it() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    first = text.split("\n\n")[1]
    assert "No GPU has run it" in first.replace("\n", " ")
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    assert len(pictures) == 2
    assert all(len(words) > 40 for words, _ in pictures)  # what a reader without eyes is told


def test_the_glossary_has_ten_words() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    words = {"flavour", "grid", "unit", "gate", "record", "profile", "bucket", "slot"}
    assert set(headings) == words | {"image token", "patch"}


def _unknown_options(line: str) -> set[str]:
    """Options of a command line that the command does not have; its name if there is none."""
    words = shlex.split(line)
    words = [*words[words.index("-m") + 1 :], ""] if words[0] == "python" else words[1:]
    name = "run" if words[0] == "mmvision_export.run" else words[0]
    if words[0].startswith("mmvision_export.verify_gpu"):
        return set()  # a program of its own, which typer and argparse here do not know
    if name not in COMMANDS:
        return {name}
    known = {"--help", "-h"}
    if name == "run":
        known |= {option for action in _parser("run")._actions for option in action.option_strings}
    for parameter in COMMANDS[name].params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    return {word.partition("=")[0] for word in words if word.startswith("--")} - known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_on_a_page_have_the_options_that_the_page_gives_them(page: Path) -> None:
    for line in command_lines(page.read_text()):
        assert not _unknown_options(line), line


def test_control_an_unknown_command_and_option_are_found() -> None:
    page = (
        "```\n$ mmvision exprt --onnx\nmmvision run --imag a  # as\nmmvision parity --json\n```\n"
    )
    lines = list(command_lines(page))
    assert [_unknown_options(line) for line in lines] == [{"exprt"}, {"--imag"}, set()]
    assert _unknown_options("python -m mmvision_export.run --nothing") == {"--nothing"}


def _section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_page_of_the_command_line_has_every_command_with_an_example() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        section = _section(text, name)
        assert any(line.split()[1] == name for line in command_lines(section)), name
        assert f"[`{name}`](#{name})" in text


def _exit_codes(source: str) -> set[int]:
    """Integers that a module exits with: given to an exit, or returned by what gives exit codes."""
    codes: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).lower().endswith("exit"):
            codes |= {
                given.value
                for given in node.args
                if isinstance(given, ast.Constant) and type(given.value) is int
            }
        elif isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or node) == "int":
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    codes |= {
                        leaf.value
                        for leaf in ast.walk(inner.value)
                        if isinstance(leaf, ast.Constant) and type(leaf.value) is int
                    }
    return codes - {128}  # what the number of a signal is added to


def test_the_page_of_the_command_line_has_every_exit_code() -> None:
    package = ROOT / "mmvision_export"
    modules = [*package.glob("cli/*.py"), package / "run.py", package / "core" / "command.py"]
    modules.append(package / "runtime" / "run_arguments.py")
    codes = {core_command.INTERRUPTED, core_command._NOBODY_READS}
    codes |= {128 + 15}  # SIGTERM, which exit_code_of handles
    for module in modules:
        codes |= _exit_codes(module.read_text())
    section = _section((ROOT / "docs" / "cli.md").read_text(), "Exit codes")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.M)} == codes


def test_control_exit_codes_are_found() -> None:
    source = "def f() -> int:\n    return 1 if x else 0\ndef g():\n    raise typer.Exit(7)\n"
    assert _exit_codes(source + "sys.exit(9)\nself.exit(2)\n") == {0, 1, 2, 7, 9}
