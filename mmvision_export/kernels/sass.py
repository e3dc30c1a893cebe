"""What the compiler made of a kernel, read back from its binary by Triton's own disassembler."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from mmvision_export.core.errors import PluginError

__all__ = ["Sass", "sass_from_cubin"]

# A line of `nvdisasm -c`: an address, perhaps a predicate, the instruction, its operands.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Sass:
    """The code of one kernel.

    Attributes:
        registers: Per thread.
        instructions: In the order of the code, with their modifiers: `LDG.E.128`.
    """

    registers: int
    instructions: tuple[str, ...]

    @classmethod
    def from_listing(cls, listing: str, *, registers: int) -> Sass:
        """Read what `nvdisasm -c` prints."""
        return cls(registers, tuple(_INSTRUCTION.findall(listing)))

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return sum(name.split(".")[0] in ("STL", "LDL") for name in self.instructions)

    @property
    def tensor_core(self) -> dict[str, int]:
        """Tensor-core instructions by name."""
        names = (name.split(".")[0] for name in self.instructions)
        return dict(sorted(Counter(n for n in names if n in ("HMMA", "HGMMA", "UTCHMMA")).items()))

    @property
    def global_accesses(self) -> Counter[str]:
        """Loads and stores of global memory by their width in bits: `LDG 16`, `STG 128`.

        One of 16 bits moves one float16 a thread, so that a row of them takes eight times the
        instructions of one of 128. `LDGSTS` loads into shared memory.
        """
        return Counter(access for name in self.instructions if (access := _access(name)))

    @property
    def loads_before_branch(self) -> int:
        """Loads of global memory that are made, from the first on, before the code can part."""
        count = 0
        for name in self.instructions:
            if count and name.split(".")[0] in ("BRA", "EXIT"):
                break
            count += _access(name).startswith("LDG")
        return count


def _access(name: str) -> str:
    operation, *modifiers = name.split(".")
    if operation not in ("LDG", "LDGSTS", "STG"):
        return ""
    widths = (m.removeprefix("U").removeprefix("S") for m in modifiers)
    return f"{operation} {next((w for w in widths if w in ('8', '16', '64', '128', '256')), '32')}"


def sass_from_cubin(cubin: bytes) -> Sass:
    """Disassemble a binary of one kernel.

    Raises:
        PluginError: It is none.
    """
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "-res-usage", file.name)
        code = _output(str(tools / "nvdisasm"), "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise PluginError(f"cuobjdump reports no registers: {usage.strip()}")
    return Sass.from_listing(code, registers=int(registers[1]))


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PluginError(f"{Path(command[0]).name} failed: {result.stderr.strip()}")
    return result.stdout
