"""What a cubin says of its entry, read from its ELF sections: the same as `plugins/tests/cubin.cpp` reads."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

__all__ = ["Entry", "entry_from_cubin"]

# Attributes of .nv.info, by the names that cuobjdump gives them.
_FORMAT_SIZED = 4
_REQNTID = 0x10
_FRAME_SIZE = 0x11
_KPARAM_INFO = 0x17
_REGCOUNT = 0x2F


@dataclasses.dataclass(frozen=True)
class Entry:
    """The one kernel of a binary.

    Attributes:
        function: Its name.
        threads: Of a block; no other number is taken.
        registers: Of a thread.
        frame_bytes: Local memory of a thread.
        static_shared_bytes: Shared memory of a block that no launch has to ask for.
        parameter_bytes: Size of each parameter.
    """

    function: str
    threads: int
    registers: int
    frame_bytes: int
    static_shared_bytes: int
    parameter_bytes: tuple[int, ...]


def entry_from_cubin(cubin: bytes) -> Entry:
    """Read a binary with one kernel."""
    sections = dict(_sections(cubin))
    (function,) = (n.removeprefix(".nv.info.") for n in sections if n.startswith(".nv.info."))
    own = list(_attributes(sections[f".nv.info.{function}"][1]))
    common = list(_attributes(sections[".nv.info"][1]))
    sizes = {}
    for attribute, value in own:
        if attribute == _KPARAM_INFO:
            ordinal, flags = struct.unpack_from("<HxxI", value, 4)
            sizes[ordinal] = flags >> 18
    assert sorted(sizes) == list(range(len(sizes)))
    (threads,) = (struct.unpack_from("<I", v)[0] for a, v in own if a == _REQNTID)
    # Each is a symbol's index and a value; functions that the entry calls have theirs.
    registers = [struct.unpack("<II", value)[1] for a, value in common if a == _REGCOUNT]
    frames = [struct.unpack("<II", value)[1] for a, value in common if a == _FRAME_SIZE]
    return Entry(
        function,
        threads,
        max(registers),
        sum(frames),
        sections.get(f".nv.shared.{function}", (0, b""))[0],
        tuple(sizes[ordinal] for ordinal in sorted(sizes)),
    )


def _sections(cubin: bytes) -> Iterator[tuple[str, tuple[int, bytes]]]:
    """Name, size and content; a section of shared memory has a size and no content."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, offset + index * size) for index in range(count)
    ]
    start = headers[names][4]
    for name, kind, _, _, at, length in headers:
        text = cubin[start + name : cubin.index(b"\0", start + name)].decode()
        yield text, (length, b"" if kind == 8 else cubin[at : at + length])


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(info):
        kind, attribute, length = struct.unpack_from("<BBH", info, at)
        if kind != _FORMAT_SIZED:
            length = 0  # the value is in the place of the length
        yield attribute, info[at + 4 : at + 4 + length]
        at += 4 + length
