"""Image files that say or hold what they should not."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from PIL import Image


def png_of_zeros(path: Path, width: int, height: int, *, bits: int = 8, colour: int = 0) -> Path:
    """A whole PNG of zeros, a thousandth of what it decodes to.

    Args:
        path: Where it is written.
        width: In pixels.
        height: In pixels.
        bits: Of a sample.
        colour: PNG's colour type, 0 for grey, 2 for RGB, 6 for RGBA.
    """
    samples = {0: 1, 2: 3, 6: 4}[colour]
    row = bytes(1 + (width * samples * bits + 7) // 8)
    packer = zlib.compressobj(9)
    rows = max(1, (1 << 20) // len(row))
    data = b"".join(
        packer.compress(row * min(rows, height - first)) for first in range(0, height, rows)
    )
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data + packer.flush()), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))
    return path


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def tiff_with_tiles(path: Path, side: int, tile_side: int) -> Path:
    """A grey TIFF of `side` pixels, in one deflated tile of `tile_side`."""
    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(tile_side)) for _ in range(tile_side)) + row.flush()
    entries = [
        (256, 4, side),
        (257, 4, side),
        (258, 3, 8),
        (259, 3, 8),  # Adobe's deflate
        (262, 3, 1),
        (277, 3, 1),
        (322, 4, tile_side),
        (323, 4, tile_side),
        (324, 4, 8),
        (325, 4, len(data)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)
    )
    return path


def jpeg_with_exif(path: Path, block: bytes) -> Path:
    """A JPEG of 60 x 40 pixels with these bytes as its EXIF block."""
    Image.new("RGB", (60, 40), "red").save(path, exif=b"Exif\0\0" + block)
    return path


def ghostscript(folder: Path) -> Path:
    """A stand-in for Ghostscript in a folder; it leaves the file that is returned, and fails."""
    folder.mkdir()
    trace = folder / "was-started"
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && exit 0\ntouch '{trace}'\nexit 1\n")
    program.chmod(0o755)
    return trace


def exif_block(orientation: int) -> bytes:
    """A whole EXIF block with an orientation and some other tags."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker"
    exif[0x011A] = 72.0
    exif.get_ifd(0x8769)[0x9003] = "2026:11:26 07:00:00"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def fifo(path: Path) -> Path:
    """A FIFO that nobody writes to."""
    os.mkfifo(path)
    return path
