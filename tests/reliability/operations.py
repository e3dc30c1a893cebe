"""Commands that write, what their folder says before and after, and what they work on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.library_record import library_record_path
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.bundle.integrity import verify_files
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.records import json_from_record

__all__ = ["OPERATIONS", "Operation", "State", "prepare"]

State = dict[str, str]
_MODEL = Path("m")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A command that writes.

    Attributes:
        name: In the table.
        command: Its arguments, run in a folder with what `prepare` has put there.
        state: What the folder says by its records, and their files prove. It raises `MmvisionError`
            where a record and its file disagree.
        prepare: Names of those before it, whose results it starts from.
        is_whole: Whether only the state before and the state after it may be seen. A folder run may
            have some of its files.
        is_repeatable: Whether it can be run again where it has ended well.
        withdraws: What may be absent from the state before: it is taken out of the records before its
            files are replaced.
    """

    name: str
    command: tuple[str, ...]
    state: Callable[[Path], State]
    prepare: tuple[str, ...] = ()
    is_whole: bool = True
    is_repeatable: bool = False
    withdraws: frozenset[str] = frozenset()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _model_state(folder: Path) -> State:
    """Files that the manifest lists and that are those it lists, verdicts and reports by name."""
    directory = folder / _MODEL
    if not directory.exists():
        return {}
    manifest = Manifest.read(directory)
    manifest.verify(directory, manifest.files)
    content = json_from_record(manifest)
    files = {name: record.sha256 for name, record in manifest.files.items()}
    reports = {f"parity of {name}": "" for name in content["parity"]}
    return {**files, **reports, **{f"report of {name}": "" for name in content["quantization"]}}


def _engine_state(folder: Path) -> State:
    """Engines that have a record, and are those of it: their bytes differ from build to build."""
    state = _model_state(folder)
    for engine in (folder / _MODEL / "plans").glob("*.engine"):
        if not engine.with_suffix(".json").exists():
            continue  # counts as absent
        record = EngineRecord.read(engine)
        record.verify(engine)
        for companion in record.companions:
            companion.content(engine)
        state[engine.name] = ""
    return state


def _library_state(folder: Path) -> State:
    library = folder / "plugins" / "libmmvision_plugins.so"
    record = library_record_path(library)
    if not record.exists():
        return {}
    PluginLibraryRecord.read(library)  # compares the library with it
    return {library.name: ""}


def _bundle_state(folder: Path) -> State:
    archive = folder / "m-cpu.tar"
    if not archive.exists():
        return {}
    if problems := verify_files(archive).problems:
        raise ManifestError(f"{archive}: {problems}")
    return {archive.name: _digest(archive)}


def _output_state(folder: Path) -> State:
    """Embeddings and their companions; not what a run notes of itself, nor what is half written."""
    return {
        path.name: _digest(path)
        for path in (folder / "out").glob("*")
        if path.is_file() and not path.name.startswith((".", "mmvision-run"))
    }


_EXPORT = ("export", "--onnx", "--checkpoint", "checkpoint", "--output", str(_MODEL))
_TARGET = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")
_RUN = ("run", "--model", str(_MODEL), "--backend", "onnxruntime-cpu", "--threads", "1")
_ENGINE = ("build-engine", "--fp16", "--model", str(_MODEL), *_TARGET)
_LIBRARY = ("build-plugins", "--sm", "80", "--head-dim", "80", "--output", "plugins")
_FOLDER = (*_RUN, "--image", "images", "--output", "out")
_VIDEO = (*_RUN, "--video", "video.mov", "--output", "out/video.npy")
_FORCED = (*_EXPORT[:3], "other", *_EXPORT[4:], "--force")
_QUANTIZE = ("quantize", "--cpu-int8", "--model", str(_MODEL))
_FLAVOUR = "model.cpu-int8.onnx"
_REPLACED = frozenset(
    {_FLAVOUR, f"{_FLAVOUR}.data", "model.cpu-int8-vnni.onnx", f"report of {_FLAVOUR}"}
)
# Another gate, so that the flavour is another.
_REQUANTIZE = (*_QUANTIZE, "--min-cosine", "0.99", "--force")
_BUNDLE = ("bundle", "--target", "cpu", "--model", str(_MODEL), "--output", "m-cpu.tar")
_PARITY = ("parity", "--model", str(_MODEL))
OPERATIONS: tuple[Operation, ...] = (
    Operation("export", _EXPORT, _model_state),
    Operation("export --force", _FORCED, _model_state, ("export",), is_repeatable=True),
    Operation("quantize", _QUANTIZE, _model_state, ("export",)),
    Operation(
        "quantize --force",
        _REQUANTIZE,
        _model_state,
        ("export", "quantize"),
        is_repeatable=True,
        withdraws=_REPLACED,
    ),
    Operation("bundle", _BUNDLE, _bundle_state, ("export",)),
    Operation("build-engine", _ENGINE, _engine_state, ("export",), is_whole=False),
    Operation("build-plugins", _LIBRARY, _library_state),
    Operation("parity", _PARITY, _model_state, ("export",), is_repeatable=True),
    Operation("folder run", _FOLDER, _output_state, ("export",), is_whole=False),
    Operation("video run", _VIDEO, _output_state, ("export",), is_whole=False),
)


def prepare(folder: Path) -> None:
    """Two checkpoints, images and a video, for the operations to work on."""
    import numpy as np
    import PIL.Image

    from tests.support.checkpoints import STATE, write_checkpoint
    from tests.support.videos import moving, write_video

    folder.mkdir()
    write_checkpoint(folder / "checkpoint", STATE)
    write_checkpoint(folder / "other", {name: -tensor for name, tensor in STATE.items()})
    images = folder / "images"
    images.mkdir()
    for number in range(12):
        levels = np.random.default_rng(number).integers(0, 256, (90, 130, 3), dtype=np.uint8)
        PIL.Image.fromarray(levels).save(images / f"{number}.png")
    write_video(folder / "video.mov", moving(24))
