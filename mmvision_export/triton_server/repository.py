"""A Triton model repository of a model directory.

```
<output>/
  vision_encoder/                     takes images or patches, packs requests (Python backend)
    config.pbtxt
    1/model.py  1/model/              the model directory, as links or copies
  vision_encoder_graph/               the graph for the ONNX Runtime backend, or
  vision_encoder_engine/              the engine for the TensorRT backend
    config.pbtxt  1/
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from pathlib import Path

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import (
    CPU_GRAPH,
    DATA,
    GRAPH,
    MANIFEST,
    PLANS,
    Manifest,
    model_directory_of,
)
from mmvision_export.core.atomic import new_directory
from mmvision_export.core.errors import InputError, ManifestError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.progress import Progress
from mmvision_export.runtime.backends import BACKENDS
from mmvision_export.triton_server.config import (
    MODEL_FOLDER,
    ServerSettings,
    WarmUp,
    python_model_config,
    raw_model_config,
    warm_ups,
)

__all__ = ["Repository", "write_repository"]

_MARKER = "README.md"
_CPU_BACKENDS = {"auto", "onnxruntime-cpu", "onnxruntime-amx", "openvino"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_MODEL_PY = '''\
"""Made by mmvision triton-repository."""

from mmvision_export.triton_server.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_README = """\
# A Triton model repository

`mmvision triton-repository` has made it. Start it with

    tritonserver --model-repository . --model-control-mode explicit --load-model {name}

The server's Python must have mmvision-export installed, with a backend that runs the model. {beside} is for the
server's own backend; load it only where the server has that backend.
"""


@dataclasses.dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        path: The repository.
        model: Name of the model that takes images or patches.
        raw_model: Name of the graph or engine as it is; None where the server has no backend for it.
        warm_ups: What each instance runs before the server is ready.
    """

    path: Path
    model: str
    raw_model: str | None
    warm_ups: tuple[WarmUp, ...]


def write_repository(
    model: Path,
    output: Path,
    settings: ServerSettings,
    *,
    name: str = "vision_encoder",
    force: bool = False,
    progress: Progress | None = None,
) -> Repository:
    """Write a repository.

    Files are hard links where the file system allows, else copies: the repository takes no space on
    the model directory's disk, and can be moved.

    Args:
        model: A model directory, or an engine in its `plans/`.
        output: The repository.
        settings: The user's choices.
        name: Of the model.
        force: Replace a repository that is there.
        progress: Told about each step.

    Raises:
        InputError: The name is none that Triton takes; the backend does not exist.
        ManifestError: Files are missing or damaged.
        OutputError: The output exists, or cannot be written.
    """
    progress = progress or Progress()
    _refuse_settings(name, settings)
    directory = model_directory_of(model)
    if directory is None:
        raise ManifestError(
            f"{model} lies in no model directory",
            hint="name an engine in a model directory's plans/",
        )
    manifest = Manifest.read(directory)
    engine = model if model.is_file() else None
    record = None if engine is None else EngineRecord.read(engine)
    on_gpu = engine is not None or settings.backend not in _CPU_BACKENDS
    with new_directory(output, marker=_MARKER, force=force) as new:
        progress.step("verifying the model directory")
        manifest.verify(directory, manifest.files)
        progress.step(f"writing {output}")
        copied = new / name / "1" / MODEL_FOLDER
        _copy_model(directory, manifest, engine, record, copied)
        profiles = () if record is None else record.profiles
        warm = warm_ups(profiles, manifest.config)
        precision = manifest.precision if record is None else record.precision
        io_dtype = PRECISIONS[precision].io_dtype
        raw = _write_raw_model(
            new, name, copied, manifest, engine, record, io_dtype=io_dtype, on_gpu=on_gpu
        )
        (new / name / "1" / "model.py").write_text(_MODEL_PY, encoding="utf-8")
        text = python_model_config(
            name,
            manifest.config,
            io_dtype=io_dtype,
            engine="" if engine is None else f"{PLANS}/{engine.name}",
            on_gpu=on_gpu,
            settings=settings,
            warm=warm,
        )
        (new / name / "config.pbtxt").write_text(text, encoding="utf-8")
        beside = "Nothing else" if raw is None else f"`{raw}`"
        (new / _MARKER).write_text(_README.format(name=name, beside=beside), encoding="utf-8")
    return Repository(output, name, raw, tuple(warm))


def _refuse_settings(name: str, settings: ServerSettings) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"a model's name is made of letters, digits, _, . and -, got {name!r}")
    if settings.backend != "auto" and settings.backend not in BACKENDS:
        raise InputError(
            f"no such backend: {settings.backend}",
            hint=f"choose one of: auto, {', '.join(BACKENDS)}",
        )


def _copy_model(
    directory: Path,
    manifest: Manifest,
    engine: Path | None,
    record: EngineRecord | None,
    target: Path,
) -> None:
    target.mkdir(parents=True)
    for file in manifest.files:
        _link(manifest.path_of(directory, file), target / file)
    # `mmvision parity` replaces it, and adds verdicts: a copy stays as it is.
    shutil.copyfile(directory / MANIFEST, target / MANIFEST)
    if engine is None or record is None:
        return
    files = record.verified_files(engine)
    (target / PLANS).mkdir()
    for path in files:
        _link(path, target / PLANS / path.name)


def _write_raw_model(
    new: Path,
    name: str,
    copied: Path,
    manifest: Manifest,
    engine: Path | None,
    record: EngineRecord | None,
    *,
    io_dtype: str,
    on_gpu: bool,
) -> str | None:
    """The graph or engine as a model of the server's own backend; None where it has none."""
    # Triton's own backend puts no weights into a stripped engine.
    if record is not None and (record.backend != "tensorrt" or record.options.strip_weights):
        return None
    raw = f"{name}_graph" if record is None else f"{name}_engine"
    version = new / raw / "1"
    version.mkdir(parents=True)
    if engine is None or record is None:
        # Of one weight file: the CPU's graph costs the sum of the images' squares.
        graph = CPU_GRAPH if not on_gpu and CPU_GRAPH in manifest.files else GRAPH
        for file in (graph, DATA):
            _link(copied / file, version / file)
        file = graph
    else:
        _link(copied / PLANS / engine.name, version / "model.plan")
        file = "model.plan"
    text = raw_model_config(
        raw,
        manifest.config,
        platform="onnxruntime_onnx" if record is None else "tensorrt_plan",
        file=file,
        io_dtype=io_dtype,
        num_profiles=0 if record is None else len(record.profiles),
        on_gpu=on_gpu,
    )
    (new / raw / "config.pbtxt").write_text(text, encoding="utf-8")
    return raw


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
