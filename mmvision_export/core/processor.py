"""What Linux says that this processor can do."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path

__all__ = ["PROCESSOR_FACTS", "cpu_has_vnni", "processor_flags", "processor_name"]

PROCESSOR_FACTS = Path("/proc/cpuinfo")


def _facts() -> dict[str, str]:
    """Facts of the first core by name; none where the system tells none."""
    try:
        with PROCESSOR_FACTS.open(encoding="utf-8", errors="replace") as file:
            # A blank line ends a core. Linux makes the text while it is read, slowly where there are many.
            pairs = [line.partition(":") for line in itertools.takewhile(str.strip, file)]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in pairs if value.strip()}


def processor_name() -> str:
    """For people; empty where nobody knows."""
    return _facts().get("model name") or platform.processor()


def processor_flags() -> frozenset[str]:
    """Instruction sets, as `avx512_vnni` on x86 or `i8mm` on ARM."""
    facts = _facts()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def cpu_has_vnni() -> bool:
    """Whether an x86 processor adds products of an unsigned and a signed byte in 32 bits.

    Without VNNI it adds two of them in 16 bits, which saturates.
    """
    return not processor_flags().isdisjoint({"avx512_vnni", "avx_vnni"})
