"""What was found on a GPU: a line as it is found, then one JSON and one page to send back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmvision_export.core.errors import message_and_hint

__all__ = ["Finding", "Findings", "Status"]

Status = Literal["pass", "FAIL", "launched", "not run"]
"""`launched` is for the stand-in, which computes nothing to judge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was tried.

    Attributes:
        part: Of the whole, as `engines`.
        case: What was tried in it.
        status: How it went.
        numbers: What was measured; units end the names.
        detail: Why it failed or was not run, or what else is worth knowing.
    """

    part: str
    case: str
    status: Status
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    detail: str | None = None

    @property
    def subject(self) -> str:
        """What was tried, for people."""
        return self.case

    @property
    def line(self) -> str:
        """For people."""
        parts = [f"{self.status}: {self.part}, {self.subject}"]
        parts += [f"{name} {value:.4g}" for name, value in self.numbers.items()]
        if self.detail is not None:
            parts.append(" ".join(self.detail.split()))
        return "; ".join(parts)


@dataclasses.dataclass
class Findings:
    """What a GPU did.

    Attributes:
        machine: Device, driver and versions.
        is_stand_in: The driver is the stand-in: launches were checked, nothing was computed.
        tell: Given each finding's line as it is made.
        findings: In order.
        is_complete: Whether it went to its end; an interrupt or a crash leaves it false.
    """

    machine: dict[str, Any]
    is_stand_in: bool
    tell: Callable[[str], None] = print
    findings: list[Finding] = dataclasses.field(default_factory=list)
    is_complete: bool = False

    def add(self, finding: Finding) -> None:
        """Keep a finding and tell it."""
        self.findings.append(finding)
        self.tell(self.line_of(finding))

    def not_run(self, part: str, case: str, why: str) -> None:
        """Say that something was not tried."""
        self.add(Finding(part=part, case=case, status="not run", detail=why))

    @contextlib.contextmanager
    def failure_is_a_finding(self, part: str, case: str) -> Iterator[None]:
        """Keep an error of the block as a finding and go on; Ctrl-C passes.

        Errors that nobody foresaw too: one engine that crashes Python code must not cost the rest.
        """
        try:
            yield
        except Exception as error:
            message, _ = message_and_hint(error)
            self.add(Finding(part=part, case=case, status="FAIL", detail=message))

    def judge(
        self, part: str, case: str, failures: list[str], numbers: dict[str, float], detail: str = ""
    ) -> None:
        """Add a finding that passes if there are no failures."""
        status: Status = "FAIL" if failures else "pass"
        words = "; ".join([*failures, *([detail] if detail else [])]) or None
        self.add(Finding(part=part, case=case, status=status, numbers=numbers, detail=words))

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(finding.status == "FAIL" for finding in self.findings)

    @property
    def summary(self) -> str:
        """One line."""
        not_run = sum(finding.status == "not run" for finding in self.findings)
        tried = len(self.findings) - not_run
        rest = f"; {not_run} not run" if not_run else ""
        if not self.is_complete:
            rest += "; not complete"
        if self.is_stand_in:
            return (
                f"stand-in driver, no GPU: {tried} launches were checked, nothing was computed; "
                f"{self.failed} failed{rest}"
            )
        return f"{self.failed} of {tried} failed{rest}"

    def line_of(self, finding: Finding) -> str:
        """A finding's line, which says where it is from."""
        return f"stand-in driver, no GPU: {finding.line}" if self.is_stand_in else finding.line

    def write(self, folder: Path) -> list[Path]:
        """Write `verify-gpu.json` and `verify-gpu.md`, and give their paths.

        The page has the machine first, then the parts in order.
        """
        content = {
            "machine": self.machine,
            "is_stand_in": self.is_stand_in,
            "is_complete": self.is_complete,
            "findings": [_json(dataclasses.asdict(finding)) for finding in self.findings],
        }
        page = [f"# verify-gpu: {self.summary}", ""]
        page += [f"* {name}: {value}" for name, value in self.machine.items()]
        for part in dict.fromkeys(finding.part for finding in self.findings):
            page += ["", f"## {part}", ""]
            page += [f"* {self.line_of(f)}" for f in self.findings if f.part == part]
        texts = {
            "verify-gpu.json": json.dumps(content, indent=1),
            "verify-gpu.md": "\n".join([*page, ""]),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]


def _json(content: dict[str, Any]) -> dict[str, Any]:
    """A finding whose numbers are JSON's, which has no NaN and no infinity."""
    numbers = content["numbers"]
    return {**content, "numbers": {k: v if math.isfinite(v) else None for k, v in numbers.items()}}
