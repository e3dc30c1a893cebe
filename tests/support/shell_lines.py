"""Commands of a page's fenced blocks, each held to the program that it names.

`fault_of` says what is wrong with one, or nothing. `mmvision` is asked by its own parsers, which read
every option and value; of other programs the forms that the pages use are listed here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from mmvision_export.cli.app import app
from mmvision_export.runtime.run_arguments import _parser
from tests.support.dockerfiles import instructions_of
from tests.support.markdown import fenced_blocks

__all__ = ["commands_in", "fault_of"]

ROOT = Path(__file__).parents[2]
_USAGE_ERROR: Any = typer.BadParameter.__base__  # of a missing or unknown option too
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def commands_in(text: str) -> Iterator[str]:
    """Commands of the blocks without a language: prompts and comments are taken off, `&&` parts."""
    for language, body in fenced_blocks(text):
        if language in ("", "sh"):
            for line in body.replace("\\\n", " ").splitlines():
                plain = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ ")).strip()
                yield from filter(None, (part.strip() for part in plain.split(" && ")))


def fault_of(command: str) -> str:
    """What is wrong with a command; nothing if all is well."""
    words = shlex.split(command.partition(" > ")[0].partition(" < ")[0])
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]  # a variable for this command
    if words[0] == "sudo":
        words = words[1:]
    name, arguments = Path(words[0]).name, words[1:]
    check = _PROGRAMS.get(name)
    return (
        f"{name} is none of the programs that a page may name"
        if check is None
        else check(arguments)
    )


def _mmvision(arguments: list[str]) -> str:
    name, *rest = arguments or [""]
    if name == "run":
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                _parser("mmvision run").parse_args(rest)
            except SystemExit as exit_:
                return said.getvalue() if exit_.code else ""
        return ""
    if name not in COMMANDS:
        return f"mmvision has no command {name!r}"
    try:
        COMMANDS[name].make_context(name, rest)
    except _USAGE_ERROR as error:
        return str(error.format_message())
    except typer.Exit:
        return ""
    return ""


def _pip(arguments: list[str]) -> str:
    if arguments[:1] != ["install"]:
        return f"pip {' '.join(arguments[:1])}"
    known = _extras()
    for index, word in enumerate(arguments):
        for extras in re.findall(r"^(?:\.|mmvision-export)\[([\w,-]+)\]$", word):
            if unknown := set(extras.split(",")) - known:
                return f"pyproject.toml has no extra {', '.join(sorted(unknown))}"
        if word in ("-c", "--constraint") and not (ROOT / arguments[index + 1]).is_file():
            return f"there is no {arguments[index + 1]}"
    return ""


@functools.cache
def _extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.M))


def _docker(arguments: list[str]) -> str:
    kind, *rest = arguments
    if kind == "build":
        file = ROOT / rest[rest.index("-f") + 1]
        if not file.is_file():
            return f"there is no {file}"
        known = {
            each.text.partition("=")[0] for each in instructions_of(file) if each.name == "ARG"
        }
        given = {
            rest[i + 1].partition("=")[0] for i, word in enumerate(rest) if word == "--build-arg"
        }
        return f"{file.name} has no ARG {', '.join(given - known)}" if given - known else ""
    if kind == "run":
        (place,) = (i for i, word in enumerate(rest) if word.startswith("mmvision:"))
        if rest[place] not in _images():
            return f"docker/README.md builds no {rest[place]}"
        return _mmvision(rest[place + 1 :])
    return f"docker {kind}"


@functools.cache
def _images() -> set[str]:
    return set(re.findall(r"-t (mmvision:\w+)", (ROOT / "docker" / "README.md").read_text()))


def _of_form(pattern: str) -> Callable[[list[str]], str]:
    """Arguments that match, with a blank between them."""
    return lambda arguments: "" if re.fullmatch(pattern, " ".join(arguments)) else "another form"


_PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "mmvision": _mmvision,
    "pip": _pip,
    "docker": _docker,
    "apt-get": _of_form(r"(update|install( --?[\w-]+)*( [a-z][\w.+-]+)+)"),
    "cat": _of_form(r"/etc/\S+"),
    "cd": _of_form(r"\S+"),
    "git": _of_form(r"clone \S+"),
    "grep": _of_form(r".+ /etc/\S+"),
    "install.sh": _of_form(""),
    "jetson_clocks": _of_form(r"(--show|--store|--restore)?"),
    "nvidia-smi": _of_form(
        r"(--query-gpu=[\w.,]+ --format=csv|-pm [01]|-pl \d+|-lgc \d+,\d+|-rgc)?"
    ),
    "nvpmodel": _of_form(r"(-q|-m \d)"),
    "python3": _of_form(r"(-m venv( --system-site-packages)? \S+|-c 'import .+'|-c import .+)"),
    "scp": _of_form(r"(-r )?\S+ \w+@\w+:\S*"),
    "source": _of_form(r"\S+/bin/activate"),
    "ssh": _of_form(r"\w+@\w+"),
    "tar": _of_form(r"x[zf]+ \S+"),
    "tegrastats": _of_form(""),
    "verify.sh": _of_form(""),
}
