"""The `mmvision` command as a fixture."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmvision_export.cli.app import main


class Result:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def errors(self) -> list[str]:
        """Lines that say something went wrong."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "hint:"))]


Command = Callable[..., Result]


@pytest.fixture
def mmvision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["mmvision", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    yield run
    signal.signal(signal.SIGTERM, before)
