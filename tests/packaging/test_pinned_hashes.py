"""What pip installed is compared with the files that are pinned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "pinned_hashes.py"
_HASHES = _SCRIPT.parents[1] / "hashes.txt"


def check(tmp_path: Path, *installed: dict[str, Any], options: tuple[str, ...] = ()) -> str:
    """What the script says of a report of pip's; nothing if all is well."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": list(installed)}))
    command = [sys.executable, str(_SCRIPT), "check", *options, str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == (not ended.stderr)
    return ended.stderr


def package(name: str, version: str, sha256: str) -> dict[str, Any]:
    """As pip reports one (pip.pypa.io/en/stable/reference/installation-report)."""
    source = {"archive_info": {"hashes": {"sha256": sha256}}}
    return {"metadata": {"name": name, "version": version}, "download_info": source}


@pytest.fixture
def pinned() -> tuple[str, str, str]:
    lines = [line.split() for line in _HASHES.read_text().splitlines()]
    (found,) = [line for line in lines if line[0] == "typing-extensions"][:1]
    return found[0], found[1], found[2]


def test_the_pinned_file(tmp_path: Path, pinned: tuple[str, str, str]) -> None:
    assert not check(tmp_path, package("Typing_Extensions", *pinned[1:]), options=("--all",))


def test_another_file_of_that_version(tmp_path: Path, pinned: tuple[str, str, str]) -> None:
    """The control."""
    name, version, sha256 = pinned
    assert "none of its files" in check(tmp_path, package(name, version, sha256[::-1]))
    without = package(name, version, sha256)
    del without["download_info"]["archive_info"]
    assert "none of its files" in check(tmp_path, without)


def test_a_package_without_a_pin(tmp_path: Path) -> None:
    """On another machine PyTorch brings CUDA's; in CI nothing may come unseen."""
    other = package("other", "1.0", "0" * 64)
    assert not check(tmp_path, other)
    assert "other 1.0 is not pinned" in check(tmp_path, other, options=("--all",))


def test_each_pin_has_a_hash() -> None:
    sys.path.insert(0, str(_SCRIPT.parent))
    try:
        import pinned_hashes
    finally:
        sys.path.pop(0)
    hashed = {tuple(line.split()[:2]) for line in _HASHES.read_text().splitlines()}
    assert set(pinned_hashes.pins(_SCRIPT.parents[1] / "constraints.txt")) <= hashed
