"""Are the packages that pip installed the files that we pinned?

`python scripts/pinned_hashes.py check REPORT` compares what `pip install --report REPORT` downloaded with `hashes.txt`.
A pinned package with another hash is an error. A package that is not pinned is one with `--all`, which CI gives.

`python scripts/pinned_hashes.py write` makes `hashes.txt` of `constraints.txt`: the SHA-256 of each file of each pinned
version that a machine of ours takes, as the package index lists them. Files from elsewhere, as a CPU build of PyTorch,
are named by hand: `--also FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_HASHES = _ROOT / "hashes.txt"
_INDEX = "https://pypi.org/simple"
_FORM = "application/vnd.pypi.simple.v1+json"
_OTHER_MACHINES = re.compile(
    r"-(pp|cp2|cp3[4-9]-cp|cp31[4-9]|graalpy)|win32|win_|musllinux|ppc64|s390|i686|armv|riscv|loongarch|ios_|android|emscripten|wasm|pyodide"
)


def normal(name: str) -> str:
    """A package's name as indices spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(constraints: Path) -> Iterator[tuple[str, str]]:
    """Name and version of each pin; of an upper bound, the bound."""
    for line in constraints.read_text().splitlines():
        if match := re.match(r"([\w.-]+)(?:\[[^]]*])?[=<]=([^\s;]+)", line):
            yield normal(match[1]), match[2]


def files_of(name: str, version: str) -> dict[str, str]:
    """File name -> SHA-256 of a version's files in the index."""
    request = urllib.request.Request(f"{_INDEX}/{name}/", headers={"Accept": _FORM})  # noqa: S310 - https
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        listed = json.load(answer)["files"]
    # name-version-tags.whl, name-version.tar.gz
    of_version = re.compile(rf"[^-]+(-[^-]+)*?-{re.escape(version)}(-.*\.whl|\.tar\.gz|\.zip)")
    return {
        file["filename"]: file["hashes"]["sha256"]
        for file in listed
        if of_version.fullmatch(file["filename"]) and not _OTHER_MACHINES.search(file["filename"])
    }


def write(also: list[Path]) -> None:
    """Make `hashes.txt`."""
    lines = set()
    for name, version in set(pins(_ROOT / "constraints.txt")):
        found = files_of(name, version).values()
        if not found:
            sys.exit(f"the index has no file of {name} {version}")
        lines |= {f"{name} {version} {digest}" for digest in found}
    for path in also:
        name, version = path.name.split("-")[:2]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.add(f"{normal(name)} {version} {digest}")
    title = "# Made by scripts/pinned_hashes.py: package, version, SHA-256 of one of its files."
    _HASHES.write_text("\n".join([title, *sorted(lines)]) + "\n")


def check(report: Path, *, everything: bool) -> list[str]:
    """What is wrong with what pip installed.

    Args:
        report: Of `pip install --report`.
        everything: Whether a package that is not pinned counts.
    """
    pinned: dict[tuple[str, str], set[str]] = {}
    for line in _HASHES.read_text().splitlines():
        if not line.startswith("#"):
            name, version, digest = line.split()
            pinned.setdefault((name, version), set()).add(digest)
    wrong = []
    for installed in json.loads(report.read_text())["install"]:
        facts, source = installed["metadata"], installed["download_info"]
        what = (normal(facts["name"]), facts["version"])
        if "dir_info" in source:  # the checkout itself
            continue
        digest = source.get("archive_info", {}).get("hashes", {}).get("sha256")
        if what not in pinned:
            if everything:
                wrong.append(f"{' '.join(what)} is not pinned")
        elif digest not in pinned[what]:
            wrong.append(f"{' '.join(what)} has SHA-256 {digest}, which is none of its files'")
    return wrong


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check")
    checks.add_argument("reports", type=Path, nargs="+")
    checks.add_argument("--all", action="store_true")
    commands.add_parser("write").add_argument("--also", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    if given.command == "write":
        write(given.also)
        return
    wrong = [each for report in given.reports for each in check(report, everything=given.all)]
    if wrong:
        sys.exit("error: " + "\n       ".join(wrong))


if __name__ == "__main__":
    main()
