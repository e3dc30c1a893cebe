"""A killed or hindered command leaves the state before it or after it, and the next run ends well."""

from __future__ import annotations

import pytest

from tests.reliability.operations import OPERATIONS
from tests.reliability.report import rows_of

_NAMES = [operation.name for operation in OPERATIONS]


def held(program: str, operation: str, *options: str) -> None:
    if operation == "build-engine":
        pytest.importorskip("tensorrt_rtx")
    code, rows, said = rows_of(program, "--operation", operation, *options)
    assert code == 0, said
    assert rows
    assert all(row["trials"] and not row["not_held"] for row in rows)


@pytest.mark.parametrize("operation", ["folder run", "export --force"])
def test_kills(operation: str) -> None:
    held("kills", operation, "--moments", "2", "--points", "2")


@pytest.mark.slow
@pytest.mark.parametrize("operation", _NAMES)
def test_more_kills(operation: str) -> None:
    trials = "2" if operation == "build-plugins" else "3"
    held("kills", operation, "--moments", trials, "--points", trials, "--seed", "1")


@pytest.mark.parametrize("operation", ["folder run"])
def test_hindrances(operation: str) -> None:
    held("hindrances", operation, "--count", "3")


@pytest.mark.slow
@pytest.mark.parametrize("operation", _NAMES)
def test_more_hindrances(operation: str) -> None:
    count = "1" if operation == "build-plugins" else "2"
    held("hindrances", operation, "--count", count, "--seed", "1")


@pytest.mark.parametrize(
    "options",
    [
        ("kills", "--moments", "0", "--points", "20"),
        pytest.param(
            ("hindrances", "--count", "12", "--kind", "file size", "failing change"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_files_written_in_place_are_found_half_written(options: tuple[str, ...]) -> None:
    """The control."""
    code, (row,), _ = rows_of(*options, "--operation", "video run", "--in-place")
    assert code == 1
    assert row["not_held"]
