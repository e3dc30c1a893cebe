"""Which TensorRT a compiled library fits: its virtual functions stand where that TensorRT has them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmvision_export.kernels.compile import plugins_root
from mmvision_export.kernels.headers import cuda_headers, tensorrt_header_version, tensorrt_headers
from tests.support.tools import tool

MAJORS = ("10", "11")


def recorded() -> dict[str, dict[str, str]]:
    """Major version -> function -> slot, of every release's headers."""
    text = (plugins_root() / "tests" / "vtable_slots.txt").read_text()
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {
        major: {function: slots[column] for function, *slots in rows}
        for column, major in enumerate(MAJORS)
    }


def slots(include: Path, folder: Path) -> dict[str, str]:
    """Function -> slot in the headers of a folder."""
    tool("g++", "g++")
    program = folder / "vtable_slots"
    source = plugins_root() / "tests" / "vtable_slots.cpp"
    command = ["g++", "-std=c++17", "-w", f"-I{include}", f"-isystem{cuda_headers()}", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())


def test_the_headers_at_hand_have_the_slots_of_their_major_version(tmp_path: Path) -> None:
    include = tensorrt_headers()
    major = tensorrt_header_version(include).partition(".")[0]
    found = slots(include, tmp_path)
    assert found == recorded()[major]
    (other,) = set(MAJORS) - {major}
    assert found != recorded()[other]


@pytest.mark.parametrize(
    ("before", "function"),
    [
        (r"virtual void log\(Severity", "ILogger::log"),
        (
            r"virtual bool deregisterCreator\(IPluginCreatorInterface const&",
            "IPluginRegistry::deregisterCreator",
        ),
    ],
)
def test_a_function_that_moves_is_seen(tmp_path: Path, before: str, function: str) -> None:
    """The control: headers with one more virtual function before the named one."""
    include = Path(shutil.copytree(tensorrt_headers(), tmp_path / "include"))
    changed = 0
    for header in include.glob("*.h"):
        text, count = re.subn(
            f"({before})", r"virtual void added() noexcept {}\n    \1", header.read_text()
        )
        header.write_text(text)
        changed += count
    assert changed == 1
    original, moved = slots(tensorrt_headers(), tmp_path), slots(include, tmp_path)
    assert int(moved[function]) == int(original[function]) + 1


def test_between_10_and_11_only_what_the_library_calls_has_moved() -> None:
    """So a library of the one registers nothing with the other, and its plugins would do."""
    of_10, of_11 = (recorded()[major] for major in MAJORS)
    assert {function for function in of_10 if of_10[function] != of_11[function]} == {
        "ILogger::log",
        "ILoggerFinder::findLogger",
        "IPluginRegistry::registerCreator",
        "IPluginRegistry::deregisterCreator",
    }
