"""How much memory a piece of Python needs, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

# Of this program alone: `ru_maxrss` begins with the peak of the process that started it. Writing 5
# into clear_refs resets the peak (proc(5)).
_PEAK = """
import pathlib as _pathlib
def _peak():
    pairs = (line.split() for line in _pathlib.Path("/proc/self/status").read_text().splitlines())
    return next(int(pair[1]) * 1024 for pair in pairs if pair and pair[0] == "VmHWM:")
"""


def peak_bytes(setup: str, work: str) -> int:
    """By how much `work` raises the peak of resident memory, after `setup`, in bytes.

    Args:
        setup: Imports and definitions.
        work: Statements; an `InputError` of theirs is let pass.
    """
    body = "\n".join(f"    {line}" for line in work.splitlines())
    program = (
        f"{_PEAK}\nfrom mmvision_export.core.errors import InputError\n{setup}\n"
        "_pathlib.Path('/proc/self/clear_refs').write_text('5')\nbefore = _peak()\n"
        f"try:\n{body}\nexcept InputError:\n    pass\n"
        "print(_peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
