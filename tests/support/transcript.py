"""A transcript: what a user types and sees, kept as text. What differs by machine and day is masked.

    $ mmvision run --image nope.jpg
    2> error: nope.jpg: no such file
    exit 1

`2>` begins a line of standard error; `exit` follows a command that did not exit with 0. To write it anew:

    python -m tests.support.transcript VENV/bin FOLDER < transcript > new
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["commands_in", "masked", "transcript_of"]

# The first that matches takes its characters away from those after it.
_MASKS: tuple[tuple[str, str], ...] = (
    # How far a long step is, which a slow machine says and a fast one does not.
    (r"(?m)^.*: (\d+ of \d+, )?(\d+ (s|min|h) ?)+(, about (\d+ (s|min|h) ?)+left)?\n", ""),
    (r"(exported on )\d{4}-\d\d-\d\d", r"\1<date>"),
    (r"\b[0-9a-f]{64}\b", "<hash>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "<date>"),
    (r"\d+(\.\d+)? [kMG]B\b", "<size>"),
    (r'("size_bytes": )\d+', r"\1<size>"),
    (r'("(?:open|preprocess|encode)": )[\d.]+', r"\1<time>"),
    (r"\b\d+\.\d+ s\b", "<time>"),
    (r"-?\b\d(\.\d+)?e-\d+", "<figure>"),
    (r"\b(?:0\.9\d{3,}|1\.0{4,})\b", "<figure>"),  # cosines
    (r"\d+\.\d+\.\d+(\+\w+)?(\.\w+)?\b", "<version>"),
    (r'("(?:max_abs|relative_l2|value)": )[\d.e-]+', r"\1<figure>"),
    (r"(largest activation: )[\d.]+", r"\1<figure>"),
)


def masked(text: str) -> str:
    """Hashes, dates, sizes, times, versions and measured figures as words; no blanks before them."""
    for pattern, mask in _MASKS:
        text = re.sub(pattern, mask, text)
    return re.sub(r" +(?=<\w+>)", " ", re.sub(r"[ \t]+$", "", text, flags=re.M))


def commands_in(transcript: str) -> list[str]:
    """The commands that were typed."""
    return [line[2:] for line in transcript.splitlines() if line.startswith("$ ")]


def transcript_of(commands: list[str], *, bin_folder: Path, folder: Path) -> str:
    """Type commands one after the other, and keep what is seen, masked.

    Args:
        commands: Lines for bash. A pipeline fails if any of its programs does.
        bin_folder: Where the installed commands are.
        folder: To type them in; it is the home too, so that no cache of this user is read.
    """
    environment = {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
    }
    lines = []
    for command in commands:
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines += [f"$ {command}", *masked(result.stdout).splitlines()]
        lines += [f"2> {line}".rstrip() for line in masked(result.stderr).splitlines()]
        if result.returncode:
            lines.append(f"exit {result.returncode}")
        lines.append("")
    return "\n".join(lines).replace(str(folder), "<folder>")


if __name__ == "__main__":
    print(
        transcript_of(
            commands_in(sys.stdin.read()), bin_folder=Path(sys.argv[1]), folder=Path(sys.argv[2])
        ),
        end="",
    )
