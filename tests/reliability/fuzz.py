"""What our own parsers make of bytes from anybody: a value, or one error of ours.

`python -m tests.reliability.fuzz --seconds 300 --parser graph` tries as long. With `atheris` installed
(`pip install atheris`, Linux, Python 3.11 to 3.13) coverage of the parser guides the bytes; without, they are damaged
seeds. docs/reliability.md has the last figures.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import dataclasses
import gc
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from PIL import Image

from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.bundle.archive import archive_problems, write_archive
from mmvision_export.core.errors import ManifestError, MmvisionError
from mmvision_export.models import family_from_file
from mmvision_export.models.minimax_m3_vl.checkpoint import read_index
from mmvision_export.models.minimax_m3_vl.config import assumed_fields, config_from_file
from mmvision_export.models.minimax_m3_vl.images import image_from_file
from mmvision_export.models.minimax_m3_vl.preprocessor_config import PreprocessorConfig, resized
from mmvision_export.models.minimax_m3_vl.resize import MAX_PIXELS
from mmvision_export.runtime.folder_record import FolderRecords
from tests.support.bundles import bundle_record
from tests.support.configs import HEAD_DIM_80

__all__ = ["PARSERS", "Parser", "damaged", "locations_by_onnx", "parsed"]

_MEMORY_BYTES = 8 << 30  # a parser that allocates what a header claims fails by this
_MAX_PIXELS = 1 << 20
_WATCHED = ("mmvision_export", "json", "PIL")


@dataclasses.dataclass(frozen=True)
class Parser:
    """A parser of ours.

    Attributes:
        file: Name of the file that holds the bytes.
        parse: Reads the file at this path. Raises nothing but errors of ours.
    """

    file: str
    parse: Callable[[Path], object]


def locations_by_onnx(message: Any) -> set[str]:
    """The external files of a graph by onnx's parser: every message that it made, field by field."""
    found: set[str] = set()
    if isinstance(message, onnx.TensorProto):
        entries = message.external_data
        found |= {entry.value for entry in entries if entry.key == "location"}
    for field, value in message.ListFields():
        if field.message_type is not None:
            repeated = isinstance(value, collections.abc.Sequence)
            for each in value if repeated else [value]:
                found |= locations_by_onnx(each)
    return found


def _graph(path: Path) -> None:
    """No file that onnx would open is missed."""
    content = path.read_bytes()
    try:
        opened = locations_by_onnx(onnx.load_model_from_string(content))
    except (DecodeError, UnicodeDecodeError, RecursionError):
        opened = set()
    found = external_locations(content)
    assert opened <= found, f"{opened - found} unseen"


def _records(path: Path) -> None:
    with FolderRecords(path.parent) as records:
        records.has(path, path.stat(), path.parent / "x.npy")


def _bundle(path: Path) -> None:
    _, problems = archive_problems(path)
    if problems:
        raise ManifestError(str(problems))


def _preprocessing(path: Path) -> None:
    """What was read serves for an image, which stays of a size that memory holds."""
    config = PreprocessorConfig.read(path, HEAD_DIM_80)
    height, width = resized(30, 40, config)
    assert height * width <= 2 * MAX_PIXELS, (height, width)


PARSERS: dict[str, Parser] = {
    "graph": Parser("model.onnx", _graph),
    "manifest": Parser("manifest.json", lambda path: Manifest.read(path.parent)),
    "sidecar": Parser("x.json", lambda path: EngineRecord.read(path.with_suffix(".engine"))),
    "bundle": Parser("x.tar", _bundle),
    "config": Parser(
        "config.json",
        lambda path: (family_from_file(path), config_from_file(path), assumed_fields(path)),
    ),
    "preprocessing": Parser("preprocessor_config.json", _preprocessing),
    "index": Parser("model.safetensors.index.json", read_index),
    "records": Parser("mmvision-run.records", _records),
    "image": Parser("photo", lambda path: image_from_file(path, max_pixels=_MAX_PIXELS)),
}


def parsed(parser: Parser, content: bytes, folder: Path) -> str | None:
    """Parse these bytes.

    Returns:
        The class of the error that refused them, or None.

    Raises:
        Exception: Any that is not an error of ours: what is looked for.
    """
    path = folder / parser.file
    path.write_bytes(content)
    (folder / "x.engine").touch()
    try:
        parser.parse(path)
    except MmvisionError as error:
        assert str(error)
        return type(error).__name__
    return None


_PIECES = (
    *(b"null", b"true", b"[]", b"{}", b"0", b"-1", b"1e400", b"NaN", b"10000000000000000000000"),
    b"1" + b"0" * 400,
    *(b'""', b'"../x"', b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000),
    *(b"\xff", b"\x00", b"\xff\xff\xff\xff\xff\x0f"),
)


def damaged(seed: bytes, chance: random.Random) -> bytes:
    """A seed with one to four changes: bits, pieces that parsers trip over, blocks twice, gone or moved."""
    content = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        size = chance.choice((1, 2, 4, 16, 64))
        change = chance.randrange(5)
        if change == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            content[at : at + size] = chance.choice(_PIECES)
        elif change == 2:
            content[at:at] = content[at : at + size] * chance.randint(1, 3)
        elif change == 3:
            del content[at : at + size]
        else:
            content[at : at + size] = chance.randbytes(size)
    return bytes(content)


def seeds(directory: Path) -> dict[str, list[bytes]]:
    """Whole files to begin with, by parser.

    Args:
        directory: A model directory with an engine in `plans/`.
    """
    (engine,) = directory.glob("plans/*.engine")
    sidecar = sidecar_path(engine)
    return {
        "graph": [_small_graph(), (directory / "model.cpu.onnx").read_bytes()],
        "manifest": _with_and_without_checksum(directory / "manifest.json"),
        "sidecar": _with_and_without_checksum(sidecar),
        "bundle": [_archive(directory.parent / "seed.tar")],
        "config": [_config()],
        "preprocessing": [(directory / "preprocessor_config.json").read_bytes()],
        "index": [json.dumps({"weight_map": {"vision_tower.x": "model.safetensors"}}).encode()],
        "records": [b'["x.npy", "/photos/x.png", 1, 2, 3]\n' * 2],
        "image": list(_images()),
    }


def _with_and_without_checksum(record: Path) -> list[bytes]:
    """Without, as earlier versions wrote it: the checksum refuses nearly all damage before the fields are read."""
    content = json.loads(record.read_bytes())
    del content["content_sha256"]
    return [record.read_bytes(), json.dumps(content).encode()]


def _archive(path: Path) -> bytes:
    content = {"README.txt": b"words\n", "model/x.npy": bytes(700)}
    write_archive(path, "x", bundle_record(content), dict(content))
    return path.read_bytes()


def _small_graph() -> bytes:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx.data")
    tensor.external_data.add(key="offset", value="0")
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    graph = onnx.helper.make_graph([node], "g", [], [], initializer=[tensor])
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def _config() -> bytes:
    vision = {
        "model_type": "minimax_m3_vl_vision",
        **HEAD_DIM_80.to_json(),
    }
    return json.dumps({"model_type": "minimax_m3_vl", "vision_config": vision}, indent=1).encode()


def _images() -> Iterator[bytes]:
    image = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, options in (
        ("JPEG", {"exif": exif}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
    ):
        file = io.BytesIO()
        with contextlib.suppress(KeyError):  # a Pillow without WebP
            image.save(file, form, **options)
            yield file.getvalue()


def main() -> None:
    """Parse bytes for some time. Ends at the first error that is not ours, which it prints."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--parser", choices=sorted(PARSERS), required=True)
    arguments.add_argument("--seconds", type=int, default=60)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    from tests.reliability.mutations import make_directory

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        first = seeds(make_directory(place / "model"))[given.parser]
        parser = PARSERS[given.parser]
        try:
            import atheris
        except ImportError:
            _blindly(parser, first, place, given.seconds, random.Random(given.seed))
            return
        corpus = place / "corpus"
        corpus.mkdir()
        for number, content in enumerate(first):
            (corpus / str(number)).write_bytes(content)
        for found in gc.get_objects():
            if isinstance(found, FunctionType) and str(found.__module__).startswith(_WATCHED):
                atheris.instrument_func(found)
        options = [f"-max_total_time={given.seconds}", f"-seed={given.seed + 1}", "-rss_limit_mb=0"]
        atheris.Setup(
            [sys.argv[0], *options, str(corpus)], lambda content: parsed(parser, content, place)
        )
        atheris.Fuzz()


def _blindly(
    parser: Parser, first: list[bytes], place: Path, seconds: int, chance: random.Random
) -> None:
    end, tried, refused = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        content = damaged(chance.choice(first), chance)
        try:
            refused += parsed(parser, content, place) is not None
        except BaseException:
            print(f"{content!r}", file=sys.stderr)
            raise
        tried += 1
    print(f"{tried} inputs, {refused} refused, 0 other errors")


if __name__ == "__main__":
    main()
