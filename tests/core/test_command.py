"""How commands end: exit codes, messages, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from mmvision_export.core.command import INTERRUPTED, ProgressLine, exit_code_of
from mmvision_export.core.errors import InputError


def fail(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_code_of_the_work(capsys: pytest.CaptureFixture[str], code: int) -> None:
    assert exit_code_of(lambda: code, verbose=False) == code
    assert capsys.readouterr().err == ""


def test_an_error_is_printed_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(fail(InputError("x.jpg", hint="do that")), verbose=False) == 1
    assert capsys.readouterr().err == "error: x.jpg\nhint: do that\n"
    assert exit_code_of(fail(ZeroDivisionError("by 0")), verbose=False) == 1
    assert "ZeroDivisionError: by 0" in capsys.readouterr().err


def test_a_command_may_answer_errors_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(fail(InputError("x")), verbose=False, on_error=lambda _: 5) == 5
    assert capsys.readouterr().err == ""


def test_verbose_lets_errors_pass_but_not_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        exit_code_of(fail(InputError("x")), verbose=True)
    assert exit_code_of(fail(KeyboardInterrupt()), verbose=True) == INTERRUPTED
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_wrong_usage_passes() -> None:
    with pytest.raises(SystemExit) as caught:
        exit_code_of(fail(SystemExit(2)), verbose=False)
    assert caught.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ends", ["as it is", "as another error", "as if nothing were"])
def test_signals_interrupt_whatever_a_library_makes_of_them(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, ends: str
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cleaned = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt:
            if ends == "as it is":
                raise
            if ends == "as another error":
                raise RuntimeError("a library was in the middle of something") from None
        finally:
            cleaned.append(number)
        return 0

    assert exit_code_of(work, verbose=False) == 128 + number
    assert cleaned == [number]
    assert len(capsys.readouterr().err.splitlines()) == 1
    # The caller's handlers are back.
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_line_counts_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ProgressLine()
    line.step("encoding", total=2)
    line.advance()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line.step("encoding", total=2)
    line.advance()
    line.advance()
    drawn = capsys.readouterr().err.split("\r")[1:]
    words = [text.replace("\x1b[K", "").split(", ")[0] for text in drawn]
    assert words == ["encoding: 0 of 2", "encoding: 1 of 2", "encoding: 2 of 2"]
    assert [text.endswith("\n") for text in drawn] == [False, False, True]


PRINTS = """
import sys
from pathlib import Path
from mmvision_export.core.command import exit_code_of
def work():
    for _ in range(100000):
        print("a line", flush=True)
    return 0
sys.exit(exit_code_of(work, verbose=False))
"""


def test_nobody_reads_what_it_prints() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_it_prints_has_no_room() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_the_systems_own_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert exit_code_of(lambda: len((tmp_path / "x").read_bytes()), verbose=False) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'x'}: No such file or directory\n"


def test_a_file_does_not_take_a_closed_streams_number(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from mmvision_export.core.command import exit_code_of\n"
        "def work():\n"
        "    file = open('file', 'wb')\n"
        "    os.write(1, b'a library prints')\n"
        "    file.write(b'content')\n"
        "    return 0\n"
        "{}"
    )
    for call, content in (
        ("sys.exit(exit_code_of(work, verbose=False))", b"content"),
        # The control: the file is standard output then.
        ("work()", b"a library printscontent"),
    ):
        command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, program.format(call)]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert (tmp_path / "file").read_bytes() == content
