"""The model directory and its `manifest.json`: its files, their source, what was checked.

```
<name>/
  model.onnx  model.onnx.data      the portable graph and its weights
  model.<flavour>.onnx             graphs derived from it
  manifest.json
  preprocessor_config.json
  plans/*.engine                   engines, each with a .json sidecar of the same stem, its layers in
                                   .layers.json, and .refit.onnx if it takes weights
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.graph_variants import data_of
from mmvision_export.artifacts.verdicts import entry_with_history
from mmvision_export.core.atomic import locked_folder, new_files
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.precision import FLOAT_PRECISIONS
from mmvision_export.core.records import json_text, read_record
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "CPU_GRAPH",
    "DATA",
    "GRAPH",
    "MANIFEST",
    "OPENVINO_GRAPH",
    "PLANS",
    "UNIFORM_GRAPH",
    "Manifest",
    "find_model_directory",
    "flavour_graph",
    "model_directory_of",
    "refuse_path",
]

GRAPH = "model.onnx"
DATA = "model.onnx.data"
CPU_GRAPH = "model.cpu.onnx"
"""The float32 graph laid out for ONNX Runtime on a CPU; its weights are in `DATA` too."""
UNIFORM_GRAPH = "model.uniform.onnx"
"""The float32 graph for images in slots of equal length, which OpenVINO reads; its weights are in `DATA`
too."""
OPENVINO_GRAPH = "model.openvino.onnx"
"""What directories have that were exported before there was `UNIFORM_GRAPH`: the portable graph as
OpenVINO reads it."""
MANIFEST = "manifest.json"
PLANS = "plans"
_FORMAT = 1


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        config: The encoder's dimensions.
        precision: Of `model.onnx`, one of `FLOAT_PRECISIONS`.
        opset: Version of the standard operators in `model.onnx`.
        source: Where the weights came from: `kind` is `checkpoint` or `random`, with what is needed
            to load them again, and `sha256` of the tensors.
        versions: Versions of the packages that made the directory.
        files: Every file of the directory that a runtime may open, by name relative to it.
        parity: Results of the last comparison, and the verdicts of all, by file name of the graph or
            engine.
        weights: The largest weight and what float16 would lose; see `weight_statistics`.
        quantization: How each quantised graph was made, and what it lost, by graph file name.
        created: When, in UTC, ISO 8601.
    """

    config: EncoderConfig
    precision: str
    opset: int
    source: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    created: str
    parity: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in FLOAT_PRECISIONS:
            raise ManifestError(
                f"precision must be one of {', '.join(FLOAT_PRECISIONS)}, got {self.precision!r}"
            )
        for name in self.files:
            refuse_path(name)
        required = {"random": {"seed"}, "checkpoint": {"checkpoint"}}.get(
            str(self.source.get("kind"))
        )
        if required is None or not required <= set(self.source):
            raise ManifestError(
                f"source must name a way to load the weights again, got {self.source!r}"
            )

    def update(
        self,
        directory: Path,
        *,
        files: Mapping[str, FileRecord] | None = None,
        parity: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
        without_parity: str | None = None,
    ) -> None:
        """Add to a directory's manifest, keeping what another process has added since it was read.

        What is added was worked out from the portable graph, its weights, and the files it is
        about: it is refused where one of them is another by now, as after an export into the same
        place. Processes that update one manifest wait for each other.

        Args:
            directory: The model directory.
            files: Files that are there now.
            parity: Results, by name of graph or engine; see `verdicts.entry_with_history`.
            quantization: Reports, by name of graph.
            without_parity: A graph or engine whose result no longer holds.

        Raises:
            ManifestError: The directory is another one by now.
            OutputError: It cannot be written.
        """
        with locked_folder(directory):
            self._update(directory, files, parity, quantization, without_parity)

    def _update(
        self,
        directory: Path,
        files: Mapping[str, FileRecord] | None,
        parity: Mapping[str, Any] | None,
        quantization: Mapping[str, Any] | None,
        without_parity: str | None,
    ) -> None:
        latest = Manifest.read(directory)
        about = {GRAPH, DATA, *(parity or {}), *(quantization or {})} - set(files or {})
        for name in sorted(about & set(self.files)):
            if latest.files.get(name) != self.files[name]:
                raise ManifestError(
                    f"{directory / name} was replaced while this command worked on it",
                    hint="run the command again",
                )
        self.files = {**latest.files, **(files or {})}
        compared = {
            name: entry_with_history(latest.parity.get(name), entry)
            for name, entry in (parity or {}).items()
        }
        self.parity = {**latest.parity, **compared}
        self.quantization = {**latest.quantization, **(quantization or {})}
        if without_parity is not None:
            self.parity.pop(without_parity, None)
        self.write(directory)

    def withdraw(self, directory: Path, names: Iterable[str]) -> None:
        """Take files out of a directory's manifest, with what it says of them, before they are replaced.

        Whoever reads the manifest from then on finds them absent, whatever becomes of the files.

        Args:
            directory: The model directory.
            names: Of files; those that the manifest does not list do not matter.

        Raises:
            ManifestError: The manifest cannot be read.
            OutputError: It cannot be written.
        """
        gone = set(names)
        with locked_folder(directory):
            latest = Manifest.read(directory)
            for attribute in ("files", "parity", "quantization"):
                there = getattr(latest, attribute)
                setattr(self, attribute, {name: e for name, e in there.items() if name not in gone})
            self.write(directory)

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the directory, in one piece."""
        with new_files(directory, name=MANIFEST) as new:
            (new / MANIFEST).write_text(self.text, encoding="utf-8")

    @property
    def text(self) -> str:
        """The file."""
        return json_text(self, form=_FORMAT)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a model directory.

        Raises:
            ManifestError: There is none, it is malformed, or it is of a later format.
        """
        if not directory.is_dir():
            raise ManifestError(
                f"{directory}: no such model directory",
                hint="make one with: mmvision export --onnx",
                reason="missing",
            )
        return read_record(
            cls,
            directory / MANIFEST,
            what="a manifest",
            formats=(_FORMAT,),
            hint="export the model again",
            upgraded=_upgraded,
        )

    def record_of(self, name: str) -> FileRecord:
        """The record of a file.

        Raises:
            ManifestError: The manifest does not list it.
        """
        if name not in self.files:
            raise ManifestError(f"the manifest does not list {name}", hint="export the model again")
        return self.files[name]

    def verify(self, directory: Path, names: Iterable[str]) -> None:
        """Check that files are present and are those the manifest describes.

        A graph must read its weights from the portable graph's file or from its own, see `graph_variants.data_of`.

        Raises:
            ManifestError: A file is missing, not in the manifest, or has another content; or a
                graph reads another file.
        """
        for name in names:
            path = self.path_of(directory, name)
            self.record_of(name).verify(path, said_by="the manifest")
            if name.endswith(".onnx"):
                self._refuse_other_weights(directory, name)

    def _refuse_other_weights(self, directory: Path, graph: str) -> None:
        path = directory / graph
        try:
            locations = external_locations(path.read_bytes())
        except ManifestError as error:
            raise ManifestError(
                f"{path}: {error}", hint="export the model again", reason=error.reason
            ) from error
        for location in sorted(locations):
            if location not in (DATA, data_of(graph)):
                raise ManifestError(
                    f"{path} reads its weights from {location!r}, which is not the weight file of "
                    "a model directory",
                    hint="export the model again",
                    reason="unsafe",
                )
            self.path_of(directory, location)

    def path_of(self, directory: Path, name: str) -> Path:
        """A file of the directory: one that lies in it, and is not a link to one elsewhere.

        Raises:
            ManifestError: The manifest does not list it, or it is a link, a folder or a device.
        """
        self.record_of(name)
        path = directory / name
        if path.is_symlink():
            raise ManifestError(
                f"{path} is a symbolic link; a model directory must hold its files itself",
                hint="put a copy of the file in its place",
                reason="unsafe",
            )
        # A FIFO would block whoever opens it; a file that is missing is refused by its record.
        if path.exists() and not path.is_file():
            raise ManifestError(f"{path}: not a regular file", reason="unsafe")
        return path


def refuse_path(name: str) -> None:
    """Refuse what is to be a file's name, and could lead out of its folder.

    Raises:
        ManifestError: It is a path, or no name at all.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ManifestError(
            f"a file of the directory must be named without a path, got {name!r}", reason="unsafe"
        )


def _upgraded(_: int, content: dict[str, Any]) -> dict[str, Any]:
    """Early manifests also named the ops that define `VarlenAttention`, which nothing read."""
    return {key: value for key, value in content.items() if key != "attention_body"}


def flavour_graph(flavour: str) -> str:
    """File name of a flavour's graph in a model directory."""
    return f"model.{flavour}.onnx"


def model_directory_of(path: Path) -> Path | None:
    """The model directory that a path is, or that an engine lies in; None for an engine alone."""
    if not path.is_file():
        return path
    folder = path.resolve().parent
    return folder.parent if folder.name == PLANS and (folder.parent / MANIFEST).is_file() else None


def find_model_directory(given: Path | None, root: Path = Path("engines")) -> Path:
    """The model directory a command works on: the one named, or the only one under the root.

    Args:
        given: What `--model` said.
        root: Folder of model directories.

    Raises:
        ManifestError: None was named, and there is not exactly one.
    """
    if given is not None:
        return given
    found = sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ManifestError(
            f"no model directory under {root}/", hint="make one with: mmvision export --onnx"
        )
    names = ", ".join(str(path) for path in found)
    raise ManifestError(
        f"{len(found)} model directories under {root}/: {names}", hint="choose one with --model"
    )
