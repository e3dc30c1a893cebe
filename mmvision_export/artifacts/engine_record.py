"""The `.json` beside every engine: what it is valid for, checked before it is deserialised.

An engine is executable content: deserialising one runs code chosen by whoever made it. The
sidecar's hash says that the file is the one that was built; it does not say that whoever built it
can be trusted.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from mmap import mmap
from pathlib import Path
from typing import Any, Literal, get_args

from mmvision_export.artifacts.build_options import AMPERE, DEFAULT_OPTIONS, BuildOptions
from mmvision_export.artifacts.build_target import Installation, TensorRTName, TensorRTVersion
from mmvision_export.artifacts.companion_file import CompanionFile, PluginFile
from mmvision_export.artifacts.gpu import Gpu
from mmvision_export.artifacts.layer_counts import LayerCounts
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.core.records import json_from_record, json_text, read_record
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = [
    "EngineAttention",
    "EngineRecord",
    "EngineWay",
    "GraphRecord",
    "NativeBody",
    "refuse_foreign_engine",
    "sidecar_path",
]

NativeBody = Literal["attention", "matmul"]
"""Standard operators that attention is built from: ONNX's own, or two products and a softmax."""

EngineWay = Literal["plugin", "packed", "native", "uniform", "equal"]
"""How an engine does attention.

`plugin` and `packed` take the segments as they are. `native` masks one product over the whole batch.
`uniform` takes images in slots of equal length, each with its padding behind it, and `equal` images
that fill their slots.
"""

_FORMAT = 2
_REBUILD = "build it again here with: mmvision build-engine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineAttention:
    """How an engine does attention.

    Attributes:
        way: Our plugins, TensorRT's packed attention, or standard operators.
        body: The standard operators it was built from; None where it has none.
        fused: Whether every attention of standard operators is known to be one fused kernel.
    """

    way: EngineWay
    body: NativeBody | None = None
    fused: bool = False

    @property
    def masked(self) -> bool:
        """Whether it is one masked product over the whole batch, which costs its square."""
        return self.way == "native"

    @property
    def rows_per_slot(self) -> int | None:
        """Rows of `grid_thw` for each slot of a launch; None where images follow one another."""
        return {"uniform": 2, "equal": 1}.get(self.way)

    def __str__(self) -> str:
        if self.way == "plugin":
            return "plugin"
        if self.way == "packed":
            return "packed, TensorRT's own"
        body = f"{self.body} body, {'fused' if self.fused else 'left to the builder'}"
        return body if self.way == "native" else f"{self.way}, {body}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """The ONNX file an engine was built from.

    Attributes:
        name: Its file name in the model directory.
        sha256: Of the file.
        data_sha256: Of the weights beside it. The graphs of two checkpoints are the same file: it
            is the weights that tell them apart.
        data_bytes: Size of the weights; None in sidecars from before it was kept.
    """

    name: str
    sha256: str
    data_sha256: str
    data_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Content of an engine's sidecar.

    Attributes:
        backend: The TensorRT that built it.
        tensorrt_version: Its version; see `loads_in`.
        compute_capabilities: GPUs it was built for; see `runs_on`.
        platform: Operating system and machine it was built on, as `linux-x86_64`.
        precision: Of the engine.
        attention: How attention was lowered.
        profiles: Accepted sizes, one entry for each optimization profile, in the engine's order.
        graph: The ONNX file it was built from.
        engine: Hash and size of the engine file.
        config: The encoder's dimensions.
        versions: Packages that took part.
        created: When, in UTC, ISO 8601.
        plugin_library: The library its plugins are in, or None if it has none.
        passed_over: What the builder could not build before it, in the order it was tried, and why.
        gpu: The GPU that its kernels were timed on: on another one of the same compute capability it
            runs, with kernels that may not be the fastest there. None where nothing was timed, and in
            sidecars from before it was kept.
        options: What else was chosen for it; none in sidecars from before they were kept.
        refit_graph: The graph as it was parsed, without its weights, by which weights are put into the
            engine; None where it takes none.
        layers: What it is made of; None where nobody listed the layers, and in sidecars from before
            they were counted.
    """

    backend: TensorRTName
    tensorrt_version: TensorRTVersion
    compute_capabilities: tuple[ComputeCapability, ...]
    platform: str
    precision: str
    attention: EngineAttention
    profiles: tuple[Profile, ...]
    graph: GraphRecord
    engine: FileRecord
    config: EncoderConfig
    versions: dict[str, str]
    created: str
    plugin_library: PluginFile | None = None
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    gpu: Gpu | None = None
    options: BuildOptions = DEFAULT_OPTIONS
    refit_graph: CompanionFile | None = None
    layers: LayerCounts | None = None

    def __post_init__(self) -> None:
        if self.options.takes_weights != (self.refit_graph is not None):
            raise ManifestError(
                "an engine that takes weights must have a refit_graph, and no other may have one"
            )
        if self.precision not in PRECISIONS:
            raise ManifestError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if not self.profiles:
            raise ManifestError("profiles must have at least one entry")
        rows = self.attention.rows_per_slot
        for index, profile in enumerate(self.profiles if rows is not None else ()):
            slots, rest = divmod(profile.max_images, rows or 1)
            if not profile.is_bucket or rest or profile.max_patches % slots:
                raise ManifestError(
                    f"profiles[{index}] of {self.attention.way} attention must be a bucket of slots "
                    f"with {rows} rows each, got {profile}"
                )

    @property
    def plan_per_weights(self) -> float | None:
        """Size of the engine, as a multiple of that of the weights it was built from.

        Above 1 are kernels, tables, and weights that several profiles keep in several layouts.
        """
        weights = self.graph.data_bytes
        return self.engine.size_bytes / weights if weights else None

    @property
    def companions(self) -> list[CompanionFile]:
        """Files that lie beside the engine and belong to it, apart from a library."""
        layers = None if self.layers is None else self.layers.file
        return [file for file in (self.refit_graph, layers) if file is not None]

    def parts(self, engine: Path) -> dict[Path, FileRecord]:
        """The engine and every file beside it that belongs to it, but the sidecar."""
        library = [] if self.plugin_library is None else [self.plugin_library]
        beside = {engine.parent / file.name: file.record for file in (*library, *self.companions)}
        return {engine: self.engine, **beside}

    def loads_in(self, version: TensorRTVersion) -> bool:
        """Whether a release of its TensorRT loads it: the one that built it, or a later one.

        References:
            Developer guide, Engine Compatibility: "engines built with version compatibility enabled
            using TensorRT 11.0 will be compatible with TensorRT 11.1 and later 11.x versions". That
            TensorRT 11 loads engines of 10, as it says too, is not relied on.
        """
        if version == self.tensorrt_version:
            return True
        built, here = self.tensorrt_version.release, version.release
        return self.options.version_compatible and built[0] == here[0] and built <= here

    def runs_on(self, gpu: ComputeCapability) -> bool:
        """Whether GPUs of a compute capability run it."""
        is_ampere_plus = self.options.hardware == "ampere-plus" and gpu >= AMPERE
        return gpu in self.compute_capabilities or (is_ampere_plus and not gpu.is_jetson)

    def takes_other_weights(self, data_sha256: str) -> bool:
        """Whether it must be given weights, or these, before it computes with them."""
        return self.options.strip_weights or (
            self.options.refit and data_sha256 != self.graph.data_sha256
        )

    def other_graph(self, manifest: Manifest) -> str | None:
        """What of the graph and weights that it was built from a model directory has otherwise.

        Returns:
            A file with both hashes, in words; None where the directory has what the engine needs.
        """
        files = [(self.graph.name, self.graph.sha256)]
        if not self.options.refit:  # one that takes other weights is as good as one built from them
            files.append((f"{self.graph.name}.data", self.graph.data_sha256))
        for file, built in files:
            here = manifest.files[file].sha256 if file in manifest.files else "none"
            if built != here:
                return f"built from {file} with sha256 {built}, the model directory has {here}"
        return None

    def to_json(self) -> dict[str, Any]:
        """The sidecar's content: attention in words for people, and as `lowering` in fields."""
        content = {
            field.name: json_from_record(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }
        return {**content, "attention": str(self.attention), "lowering": content["attention"]}

    def write(self, path: Path) -> None:
        """Write the sidecar to a path that is not yet public (see `files.new_files`)."""
        path.write_text(json_text(self, form=_FORMAT), encoding="utf-8")

    def verify(self, engine: Path) -> None:
        """Check that an engine file is the one this sidecar was written for.

        Raises:
            ManifestError: It is missing, or has another length or content.
        """
        self.engine.verify(engine, said_by="its sidecar")

    def verified_files(self, engine: Path) -> list[Path]:
        """All that is copied with an engine: its sidecar, and `parts`, verified.

        Raises:
            ManifestError: A file is missing, or not the one that was written with the engine.
        """
        self.verify(engine)
        if self.plugin_library is not None:
            self.plugin_library.verify(engine)
        for companion in self.companions:
            companion.content(engine)
        return [sidecar_path(engine), *self.parts(engine)]

    def verified_map(self, engine: Path) -> AbstractContextManager[mmap]:
        """The engine file in memory, mapped and verified. See `FileRecord.verified_map`."""
        return self.engine.verified_map(engine, said_by="its sidecar")

    @classmethod
    def read(cls, engine: Path) -> EngineRecord:
        """Read the sidecar of an engine file.

        Raises:
            ManifestError: There is no engine or no sidecar, or the sidecar is malformed.
        """
        if not engine.is_file():
            raise ManifestError(
                f"{engine}: no such engine", hint="build one with: mmvision build-engine"
            )
        path = sidecar_path(engine)
        if not path.is_file():
            raise ManifestError(
                f"{path} is missing, which records what {engine.name} is valid for", hint=_REBUILD
            )
        return read_record(
            cls,
            path,
            what="an engine's record",
            formats=(1, _FORMAT),
            hint=_REBUILD,
            upgraded=_upgraded,
        )


def _upgraded(form: int, content: dict[str, Any]) -> dict[str, Any]:
    """Today's fields of any sidecar: format 1 had one profile, and the first ones no `lowering`."""
    content = dict(content)
    if form == 1 and "profile" in content:
        content["profiles"] = [content.pop("profile")]
    words = content.get("attention")
    lowering = content.pop("lowering", None)
    if lowering is None and isinstance(words, str):
        way = next((way for way in get_args(EngineWay) if words.startswith(way)), "native")
        body = words.partition(" body, ")[0].rpartition(" ")[2]
        lowering = {
            "way": way,
            "body": body if body in get_args(NativeBody) else None,
            "fused": words.endswith(", fused"),
        }
    return {**content, "attention": lowering}


def sidecar_path(engine: Path) -> Path:
    """The sidecar's path: the engine's with `.json` for its last suffix."""
    return engine.with_suffix(".json")


def refuse_foreign_engine(
    engine: Path,
    record: EngineRecord,
    *,
    here: Installation,
    compute_capability: ComputeCapability,
    manifest: Manifest | None,
) -> None:
    """Refuse an engine that was not built for this GPU, TensorRT, platform or graph.

    Args:
        engine: The engine file.
        record: Its sidecar.
        here: The TensorRT that shall load it.
        compute_capability: This GPU's.
        manifest: Of the model directory the engine lies in, if it does.

    Raises:
        ManifestError: Names what differs, with both values.
    """
    is_loaded = record.loads_in(here.tensorrt_version)
    for what, built, installed, fits in (
        ("TensorRT kind", record.backend, here.backend, record.backend == here.backend),
        ("TensorRT version", record.tensorrt_version, here.tensorrt_version, is_loaded),
        ("platform", record.platform, here.platform, record.platform == here.platform),
    ):
        if not fits:
            raise ManifestError(
                f"{engine}: built for {what} {built}, this machine has {installed}", hint=_REBUILD
            )
    if not record.runs_on(compute_capability):
        capabilities = ", ".join(map(str, record.compute_capabilities))
        raise ManifestError(
            f"{engine}: built for compute capability {capabilities}, "
            f"this GPU has {compute_capability}",
            hint=_REBUILD,
        )
    if manifest is not None:
        if (other := record.other_graph(manifest)) is not None:
            raise ManifestError(f"{engine}: {other}", hint=_REBUILD)
    elif record.options.strip_weights:
        raise ManifestError(
            f"{engine} has no weights of its own, and lies in no model directory to take them from",
            hint="put it and its sidecar into plans/ of the model directory, and open that",
        )
