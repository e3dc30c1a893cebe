"""The `.json` beside every engine: what the engine is valid for, checked before a byte of it is deserialised.

An engine is executable content: deserialising one runs code chosen by whoever made it. The sidecar's hash says that the
file is the one that was built; it does not say that whoever built it can be trusted.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ConfigError, ManifestError
from mmvision_export.core.files import FileRecord, read_json
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig

__all__ = ["EngineRecord", "PluginFile", "refuse_foreign_engine", "sidecar_path"]

_FORMAT = 2
_REBUILD = "build it again here with: mmvision build-engine"


@dataclasses.dataclass(frozen=True)
class PluginFile:
    """The plugin library an engine needs, which lies beside it.

    Attributes:
        name: File name; part of the hash is in it, so that engines of several libraries share a folder.
        record: Hash and size.
    """

    name: str
    record: FileRecord

    @classmethod
    def of(cls, record: FileRecord) -> PluginFile:
        """The name a library has beside engines."""
        return cls(f"libmmvision_plugins-{record.sha256[:12]}.so", record)

    def verify(self, engine: Path) -> Path:
        """Check the library beside an engine, and give its path.

        Raises:
            ManifestError: It is missing, or not the one the engine was built with.
        """
        path = engine.parent / self.name
        if not path.is_file():
            raise ManifestError(
                f"{engine} needs the plugin library {path}, which is missing (sha256 {self.record.sha256})",
                hint="copy it from where the engine was built, or build the engine again here",
            )
        self.record.verify(path, said_by=f"the sidecar of {engine.name}")
        return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Content of an engine's sidecar.

    Attributes:
        backend: `tensorrt` or `tensorrt-rtx`.
        tensorrt_version: Version that built it; an engine loads in that version only.
        compute_capabilities: GPUs it runs on, as `8.9`.
        platform: Operating system and machine it was built on, as `linux-x86_64`.
        precision: fp32, fp16 or bf16.
        attention: How attention was lowered.
        profiles: Accepted sizes, one entry for each optimization profile, in the engine's order.
        graph: Of the ONNX file it was built from: `name`, `sha256`, and `data_sha256` of the weights beside it.
        engine: Hash and size of the engine file.
        config: The encoder's dimensions.
        versions: Packages that took part.
        created: When, in UTC, ISO 8601.
        plugin_library: The library its plugins are in, or None if it has none.
    """

    backend: str
    tensorrt_version: str
    compute_capabilities: list[str]
    platform: str
    precision: str
    attention: str
    profiles: list[Profile]
    graph: dict[str, str]
    engine: FileRecord
    config: EncoderConfig
    versions: dict[str, str]
    created: str
    plugin_library: PluginFile | None = None

    def __post_init__(self) -> None:
        capabilities = self.compute_capabilities
        if not isinstance(capabilities, list) or not all(
            isinstance(item, str) for item in capabilities
        ):
            raise ManifestError(
                f"compute_capabilities must be a list of strings, got {capabilities!r}"
            )
        if not self.profiles:
            raise ManifestError("profiles must have at least one entry")
        if set(self.graph) != {"name", "sha256", "data_sha256"}:
            raise ManifestError(f"graph must have name, sha256 and data_sha256, got {self.graph!r}")

    @property
    def masked(self) -> bool:
        """Whether attention is one masked product over the whole batch, which costs its square."""
        return not self.attention.startswith(("plugin", "packed"))

    def write(self, path: Path) -> None:
        """Write the sidecar to a path that is not yet public (see `output.new_files`)."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def verify(self, engine: Path) -> None:
        """Check that an engine file is the one this sidecar was written for.

        Raises:
            ManifestError: It is missing, or has another length or content.
        """
        self.engine.verify(engine, said_by="its sidecar")

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
                f"{path} is missing: nothing says what {engine.name} is valid for", hint=_REBUILD
            )
        content = read_json(path)
        form = content.pop("format", None)
        if form not in (1, _FORMAT):
            raise ManifestError(
                f"{path}: not a sidecar of format {_FORMAT} or earlier", hint=_REBUILD
            )
        try:
            if form == 1:  # an engine had one profile
                content["profiles"] = [content.pop("profile")]
            profiles = [Profile(**profile) for profile in content.pop("profiles")]
            record = FileRecord(**content.pop("engine"))
            config = EncoderConfig.from_dict(content.pop("config"))
            plugins = content.pop("plugin_library", None)
            library = (
                None
                if plugins is None
                else PluginFile(plugins["name"], FileRecord(**plugins["record"]))
            )
            return cls(
                profiles=profiles, engine=record, config=config, plugin_library=library, **content
            )
        except (KeyError, TypeError, AttributeError, ConfigError, ManifestError) as error:
            raise ManifestError(f"{path}: malformed: {error}", hint=_REBUILD) from error


def sidecar_path(engine: Path) -> Path:
    """The sidecar's path: the engine's with `.json` for its last suffix."""
    return engine.with_suffix(".json")


def refuse_foreign_engine(
    engine: Path,
    record: EngineRecord,
    *,
    backend: str,
    tensorrt_version: str,
    compute_capability: ComputeCapability,
    platform: str,
    manifest: Manifest | None,
) -> None:
    """Refuse an engine that was not built for this GPU, TensorRT, platform or graph, or is not the file that was built.

    Args:
        engine: The engine file.
        record: Its sidecar.
        backend: The installed TensorRT's kind.
        tensorrt_version: The installed TensorRT's version.
        compute_capability: This GPU's.
        platform: This machine's.
        manifest: Of the model directory the engine lies in, if it does.

    Raises:
        ManifestError: Names what differs, with both values.
    """
    for what, built, here in (
        ("TensorRT kind", record.backend, backend),
        ("TensorRT version", record.tensorrt_version, tensorrt_version),
        ("platform", record.platform, platform),
    ):
        if built != here:
            raise ManifestError(
                f"{engine}: built for {what} {built}, this machine has {here}", hint=_REBUILD
            )
    if str(compute_capability) not in record.compute_capabilities:
        built = ", ".join(record.compute_capabilities)
        raise ManifestError(
            f"{engine}: built for compute capability {built}, this GPU has {compute_capability}",
            hint=_REBUILD,
        )
    if manifest is not None:
        name = record.graph["name"]
        # The graph of two checkpoints is the same file: it is the weights that tell them apart.
        for file, built in (
            (name, record.graph["sha256"]),
            (f"{name}.data", record.graph["data_sha256"]),
        ):
            here = manifest.files[file].sha256 if file in manifest.files else "none"
            if built != here:
                raise ManifestError(
                    f"{engine}: built from {file} with sha256 {built}, the model directory has {here}",
                    hint=_REBUILD,
                )
    record.verify(engine)
