"""How long each part may take, so that the whole ends while the GPU is still lent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from mmvision_export.core.errors import InputError
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["SHARES", "Budget"]

SHARES = {
    "kernels": 0.10,
    "engines": 0.50,
    "captures": 0.08,
    "leaks": 0.10,
    "latency": 0.10,
    "arrays": 0.04,
    "refusals": 0.02,
    "runtime cache": 0.02,
    "sanitizer": 0.04,
}
"""Part -> its share of the time, in order. What a part leaves is for those after it."""


@dataclasses.dataclass
class Budget:
    """A number of minutes from now on.

    It is asked between steps. One that has begun is not cut short, since a TensorRT builder cannot
    be.

    Raises:
        InputError: It is no time.
    """

    minutes: float
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise InputError(f"--budget-minutes must be more than 0, got {self.minutes}")
        self._started = self.now()

    def seconds_left(self, part: str) -> float:
        """Until a part must end; 0 if its time is spent."""
        names = list(SHARES)
        until = sum(SHARES[name] for name in names[: names.index(part) + 1])
        return max(0.0, self._started + 60 * self.minutes * until - self.now())

    def allows(self, part: str, case: str, findings: Findings) -> bool:
        """Whether there is time for a case; where there is none, that is a finding."""
        if self.is_spent(part):
            findings.not_run(part, case, "no time is left")
            return False
        return True

    def is_spent(self, part: str) -> bool:
        """Whether a part must begin nothing more."""
        return self.seconds_left(part) == 0
