"""What Linux says that this processor can do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PROCESSOR_FACTS", "cpu_has_vnni", "processor_facts", "processor_flags"]

PROCESSOR_FACTS = Path("/proc/cpuinfo")


def processor_facts() -> dict[str, str]:
    """Facts of the last core by name, as `model name`; none where the system tells none."""
    try:
        text = PROCESSOR_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs if value}


def processor_flags() -> frozenset[str]:
    """Instruction sets, as `avx512_vnni` on x86 or `i8mm` on ARM."""
    facts = processor_facts()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def cpu_has_vnni() -> bool:
    """Whether an x86 processor adds products of an unsigned and a signed byte in 32 bits.

    Without VNNI it adds two of them in 16 bits, which saturates.
    """
    return not processor_flags().isdisjoint({"avx512_vnni", "avx_vnni"})
