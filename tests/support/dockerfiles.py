"""Dockerfiles as their builder reads them: instructions with continued lines joined."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "Instruction",
    "copied_from_context",
    "instructions_of",
    "is_ignored",
    "pip_requirement",
]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One step.

    Attributes:
        name: As `RUN`.
        text: What follows the name, in one line.
    """

    name: str
    text: str


def instructions_of(path: Path) -> list[Instruction]:
    """The instructions, without comments.

    References:
        https://docs.docker.com/reference/dockerfile, *Format*.
    """
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        if line.strip():
            name, _, text = line.strip().partition(" ")
            found.append(Instruction(name, re.sub(r"\s+", " ", text.strip())))
    return found


def pip_requirement(instructions: list[Instruction]) -> tuple[list[str], str | None]:
    """Extras of this project that the last image installs, and the file of constraints.

    An extra that an argument chooses is the argument's default.
    """
    defaults = dict(
        each.text.split("=", 1) for each in instructions if each.name == "ARG" and "=" in each.text
    )
    installs = [each.text for each in instructions if "pip install" in each.text]
    assert len(installs) == 1
    (chosen,) = re.findall(r"\[(?:\$\{(\w+)\}|([\w,]+))\]", installs[0])
    extras = defaults[chosen[0]] if chosen[0] else chosen[1]
    constraint = re.search(r"--constraint (\S+)", installs[0])
    return extras.split(","), constraint and Path(constraint[1]).name


def copied_from_context(instructions: list[Instruction]) -> Iterator[str]:
    """What `COPY` takes from the checkout."""
    for each in instructions:
        words = shlex.split(each.text)
        if each.name == "COPY" and not words[0].startswith("--from"):
            yield from words[:-1]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether `.dockerignore` keeps a path of the checkout out of the build; the last match decides.

    References:
        https://docs.docker.com/build/concepts/context, *.dockerignore files*.
    """
    ignored = False
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        anywhere = bare.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(each, bare)
            or (anywhere != bare and fnmatch.fnmatchcase(Path(each).name, anywhere))
            for each in parents
        ):
            ignored = not pattern.startswith("!")
    return ignored
