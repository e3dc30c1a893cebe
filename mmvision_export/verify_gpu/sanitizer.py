"""A run of each engine under compute-sanitizer, which comes with the CUDA toolkit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["check_sanitizer"]

_PART = "sanitizer"
_FOUND = 99
"""Exit code for errors that it found; the program's own are others."""


def check_sanitizer(engines: Sequence[BuiltEngine], findings: Findings, budget: Budget) -> None:
    """Run the deployed entry point on each engine under memcheck."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        findings.not_run(_PART, "memcheck", "compute-sanitizer is not installed")
        return
    for engine in engines:
        if not budget.allows(_PART, engine.name, findings):
            continue
        command = [program, "--tool", "memcheck", "--error-exitcode", str(_FOUND)]
        command += [sys.executable, "-m", "mmvision_export.run", "--model", str(engine.path)]
        command += ["--backend", engine.record.backend]
        with findings.failure_is_a_finding(_PART, engine.name):
            try:
                ran = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=budget.seconds_left(_PART),
                )
            except subprocess.TimeoutExpired:
                findings.not_run(_PART, engine.name, "it was not done when the time was")
                continue
            failures = []
            if ran.returncode:
                lines = (ran.stdout + ran.stderr).splitlines()
                wrong = [x for x in lines if x.startswith(("========= ", "error:"))]
                failures = [f"exit code {ran.returncode}", *wrong[:4], *wrong[4:][-1:]]
            findings.judge(_PART, engine.name, failures, {})
