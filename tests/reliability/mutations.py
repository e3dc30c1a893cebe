"""Damage to every file of a model directory, and what opening the directory makes of it.

`python -m tests.reliability.mutations --count 2000` tries as many; docs/reliability.md has the last figures.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image

from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core import processor
from mmvision_export.core.errors import MmvisionError
from mmvision_export.core.records import json_from_record
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.sample_batches import sample_batch
from mmvision_export.models.weights import WeightSource
from mmvision_export.quantize.quantize import quantize
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.support.configs import HEAD_DIM_80, batch
from tests.support.engines import write_engine

__all__ = ["ARTIFACTS", "Artifact", "Tried", "encoded", "make_directory", "try_mutations"]

_GRID = [(1, 4, 6), (2, 2, 2)]
_PHOTO = PIL.Image.fromarray(
    np.random.default_rng(5).integers(0, 256, (90, 130, 3), dtype=np.uint8)
)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file of the directory, and a use of it whose result must not change unseen.

    Attributes:
        name: Relative to the directory.
        use: Gives what the file decides, as bytes.
    """

    name: str
    use: Callable[[Path], bytes]


@dataclasses.dataclass(frozen=True)
class Tried:
    """One mutation and what came of it.

    Attributes:
        artifact: The file's name.
        mutation: What was done to it.
        outcome: `refused`, `harmless`, `unnamed` (refused by an error that does not name the
            file), `different` (another result and no error), or the class of an error that is not
            ours.
        said: The error.
    """

    artifact: str
    mutation: str
    outcome: str
    said: str = ""

    @property
    def is_held(self) -> bool:
        """Whether the promise held."""
        return self.outcome in ("refused", "harmless")


def encoded(backend: str, *, vnni: bool = False, **options: Any) -> Callable[[Path], bytes]:
    """The use that opens the directory and encodes patches and a photograph.

    Args:
        backend: Of `VisionEncoder.open`.
        vnni: Whether the processor is taken to have VNNI, whatever it has.
        **options: Of `VisionEncoder.open` too.
    """

    def use(directory: Path) -> bytes:
        pixels, rows = batch(_GRID, HEAD_DIM_80)
        flags = frozenset({"avx512_vnni"} if vnni else ())
        with (
            mock.patch.object(processor, "processor_flags", return_value=flags),
            VisionEncoder.open(directory, backend=backend, threads=1, **options) as encoder,
        ):
            of_patches = encoder(pixels, rows)
            (of_photo,) = encoder.encode_images([_PHOTO])
            return bytes(of_patches.tobytes() + of_photo.tobytes())

    return use


def _engine(directory: Path) -> bytes:
    (engine,) = (directory / "plans").glob("*.engine")
    record = EngineRecord.read(engine)
    with record.verified_map(engine) as content:
        facts = json_from_record(record)
        # Who built it and when decides nothing.
        for words in ("created", "versions", "passed_over", "gpu"):
            facts.pop(words)
        return json.dumps(facts, sort_keys=True).encode() + content[:]


_CPU = encoded("onnxruntime-cpu")
ARTIFACTS: tuple[Artifact, ...] = (
    Artifact("manifest.json", _CPU),
    Artifact("model.cpu.onnx", _CPU),
    Artifact("model.onnx.data", _CPU),
    Artifact("preprocessor_config.json", _CPU),
    Artifact("model.onnx", _CPU),
    Artifact("model.uniform.onnx", encoded("openvino")),
    Artifact("model.cpu-int8.onnx", encoded("onnxruntime-cpu", flavour="cpu-int8")),
    Artifact("model.cpu-int8-vnni.onnx", encoded("onnxruntime-cpu", vnni=True, flavour="cpu-int8")),
    Artifact("model.cpu-int8.onnx.data", encoded("onnxruntime-cpu", flavour="cpu-int8")),
    Artifact("plans/*.engine", _engine),
    Artifact("plans/*.json", _engine),
)


def make_directory(directory: Path) -> Path:
    """A small model directory with every kind of file."""
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=1), directory)
    samples = [sample_batch(((1, 6, 8), (1, 4, 4)), HEAD_DIM_80, seed=seed) for seed in range(3)]
    quantize(
        directory,
        Manifest.read(directory),
        "cpu-int8",
        calibration=samples[:2],
        held_out=samples[2:],
        method="minmax",
    )
    write_engine(directory / "plans", config=HEAD_DIM_80)
    return directory


def try_mutations(
    directory: Path, count: int, seed: int, artifacts: Sequence[Artifact] = ARTIFACTS
) -> Iterator[Tried]:
    """Damage one file at a time, use the directory, and mend the file.

    Args:
        directory: See `make_directory`; it is as before when the iterator is done.
        count: How many mutations, of all files in turn.
        seed: Of the choice.
        artifacts: Which files.
    """
    expected = {artifact.use: artifact.use(directory) for artifact in artifacts}
    chance = random.Random(seed)
    for number in range(count):
        artifact = artifacts[number % len(artifacts)]
        (path,) = directory.glob(artifact.name)
        whole = path.read_bytes()
        kind, damaged = _damaged(whole, path, chance)
        if damaged == whole:
            yield Tried(artifact.name, kind, "harmless")
            continue
        try:
            _put(path, damaged)
            yield _tried(artifact, kind, path, directory, expected[artifact.use])
        finally:
            _put(path, whole)


def _tried(artifact: Artifact, kind: str, path: Path, directory: Path, expected: bytes) -> Tried:
    try:
        result = artifact.use(directory)
    except MmvisionError as error:
        # An engine's sidecar vouches for it, so that either may be named.
        names = (path.name, sidecar_path(path).name, path.with_suffix(".engine").name)
        is_named = any(name in str(error) for name in names)
        outcome = "refused" if is_named else "unnamed"
        return Tried(artifact.name, kind, outcome, str(error))
    except Exception as error:
        return Tried(artifact.name, kind, type(error).__name__, repr(error))
    return Tried(artifact.name, kind, "harmless" if result == expected else "different")


def _put(path: Path, content: bytes | None) -> None:
    """A file with this content in the path's place, or a folder for None."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


def _damaged(whole: bytes, path: Path, chance: random.Random) -> tuple[str, bytes | None]:
    kinds: dict[str, Callable[[], bytes | None]] = {
        "one bit": lambda: _at(whole, chance, lambda byte: byte ^ 1 << chance.randrange(8)),
        "one byte": lambda: _at(whole, chance, lambda byte: chance.randrange(256)),
        "cut": lambda: whole[: chance.randrange(len(whole))],
        "empty": lambda: b"",
        "longer": lambda: whole + chance.randbytes(chance.randrange(1, 100)),
        "a block of zeros": lambda: _block(whole, chance, lambda block: bytes(len(block))),
        "a block of noise": lambda: _block(
            whole, chance, lambda block: chance.randbytes(len(block))
        ),
        "a block gone": lambda: _block(whole, chance, lambda block: b""),
        "a block twice": lambda: _block(whole, chance, lambda block: block * 2),
        "another file": lambda: chance.choice(
            [each for each in sorted(path.parent.iterdir()) if each.is_file() and each != path]
        ).read_bytes(),
        "a folder": lambda: None,
    }
    if path.suffix == ".json":
        # Text that still parses is what a check of the form does not find.
        change = chance.choice((_drop, _retype, _nudge, _rename))
        parsed: dict[str, Callable[[], bytes | None]] = {
            f"JSON: {change.__name__[1:]}": lambda: _changed(whole, chance, change)
        }
        kinds = {**parsed, **kinds} if chance.random() < 0.3 else parsed
    kind = chance.choice(sorted(kinds))
    return kind, kinds[kind]()


def _at(whole: bytes, chance: random.Random, change: Callable[[int], int]) -> bytes:
    index = chance.randrange(len(whole))
    return whole[:index] + bytes([change(whole[index])]) + whole[index + 1 :]


def _block(whole: bytes, chance: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    begin = chance.randrange(len(whole))
    end = min(len(whole), begin + chance.choice((4, 64, 4096)))
    return whole[:begin] + change(whole[begin:end]) + whole[end:]


def _changed(
    whole: bytes, chance: random.Random, change: Callable[[Any, Any, random.Random], None]
) -> bytes:
    content = json.loads(whole)
    places = [
        (parent, key)
        for parent in _containers(content)
        for key in (parent if isinstance(parent, dict) else range(len(parent)))
    ]
    change(*chance.choice(places), chance)
    return json.dumps(content, indent=2).encode()


def _containers(content: Any) -> Iterator[Any]:
    if isinstance(content, (dict, list)):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from _containers(value)


def _drop(parent: Any, key: Any, chance: random.Random) -> None:
    del parent[key]


def _rename(parent: Any, key: Any, chance: random.Random) -> None:
    value = parent.pop(key)
    if isinstance(parent, dict):
        parent[f"{key}x"] = value


def _retype(parent: Any, key: Any, chance: random.Random) -> None:
    others: tuple[Any, ...] = (
        None,
        True,
        [],
        {},
        "",
        "x",
        -1,
        0,
        1e308,
        float("nan"),
        10**30,
        [[[]]],
        "../x",
    )
    parent[key] = chance.choice(others)


def _nudge(parent: Any, key: Any, chance: random.Random) -> None:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, (int, float)):
        parent[key] = chance.choice((value + 1, value * 2, -value, value / 2))
    elif isinstance(value, str):
        parent[key] = chance.choice((value[1:], value + "0", value.upper(), value[::-1]))
    else:
        _retype(parent, key, chance)


def main() -> None:
    """Try many, print what did not hold, and count."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--count", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    try:
        for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            os.environ[variable] = str(folder / variable)
        directory = make_directory(folder / "model")
        for tried in try_mutations(directory, given.count, given.seed):
            counts[tried.artifact, tried.outcome] += 1
            if not tried.is_held:
                print(f"{tried.artifact}, {tried.mutation}: {tried.outcome} {tried.said}")
    finally:
        shutil.rmtree(folder)
    for (artifact, outcome), number in sorted(counts.items()):
        print(f"{artifact:28}{outcome:12}{number:6}")
    print(f"{given.count} mutations, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
