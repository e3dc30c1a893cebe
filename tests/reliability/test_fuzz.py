"""Bytes from anybody give a value or an error of ours: a short form of `fuzz`."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.fuzz import PARSERS, Parser, damaged, parsed, seeds
from tests.reliability.mutations import make_directory

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    return seeds(make_directory(tmp_path_factory.mktemp("seeds") / "model"))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it reads
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_damaged_bytes(name: str, first: dict[str, list[bytes]], tmp_path: Path) -> None:
    chance = random.Random(name)
    refused = [
        parsed(PARSERS[name], damaged(chance.choice(first[name]), chance), tmp_path)
        for _ in range(200)
    ]
    # Records of a folder are passed over line by line, and never refused.
    assert any(refused) == (name != "records")


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_whole_bytes_are_taken(name: str, first: dict[str, list[bytes]], tmp_path: Path) -> None:
    """The control: damage is refused for what it is."""
    assert [parsed(PARSERS[name], content, tmp_path) for content in first[name]] == [None] * len(
        first[name]
    )


def test_an_error_that_is_not_ours_is_found(tmp_path: Path) -> None:
    """The control."""
    naive = Parser("x.json", lambda path: path.read_bytes()[0])
    with pytest.raises(IndexError):
        for size in range(3, -1, -1):
            parsed(naive, b"{}\n"[:size], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_more_damaged_bytes(name: str) -> None:
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--parser", name, "--seconds", "15"]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
