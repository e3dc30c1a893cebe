"""The encoder's dimensions, and how they are read from a checkpoint's `config.json`.

Two spellings are accepted: the released one (`vision_config.img_token_compression_config`,
`rope_mode: "3d"`; also SGLang's and NeMo's) and transformers' (`vision_config.rope_parameters`,
`rope_type: "axial"`). A value this exporter does not implement is an error that names the field,
never a silent default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmvision_export.core.errors import ConfigError, InputError
from mmvision_export.core.files import json_from_file

__all__ = [
    "PRESETS",
    "EncoderConfig",
    "Preset",
    "assumed_fields",
    "config_from_dict",
    "config_from_file",
]


# Far beyond any vision tower, and small enough that a file which says more is refused at once.
_LARGEST_SIZE = 2**20
_LARGEST: Mapping[str, float] = {
    "num_hidden_layers": 1024,
    "patch_size": 1024,
    "num_channels": 1024,
    "temporal_patch_size": 1024,
    "spatial_merge_size": 1024,
    "layer_norm_eps": 1.0,
    "rope_theta": 1e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Dimensions of the vision tower, projector and patch merger.

    Defaults are the released checkpoint's.

    Attributes:
        hidden_size: Width of the tower.
        num_attention_heads: Heads; `head_dim = hidden_size / num_attention_heads`.
        num_hidden_layers: Transformer layers.
        intermediate_size: Width of each layer's MLP.
        num_channels: Image channels.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames in one patch.
        spatial_merge_size: Side, in patches, of the block merged into one image token.
        layer_norm_eps: Epsilon of every layer norm.
        rope_theta: Base of the rotary frequencies.
        segment_max_frames: Temporal patches that may attend to each other in a video.
        text_hidden_size: Width of an image token, that is of the language model.
        projector_hidden_size: Inner width of the projector and of the merger.
        projector_bias: Whether the projector's two products have a bias.
        merger_bias: Whether the merger's two products have a bias.

    Raises:
        ConfigError: A dimension is not positive, or the dimensions do not fit together.
    """

    hidden_size: int = 1280
    num_attention_heads: int = 16
    num_hidden_layers: int = 32
    intermediate_size: int = 5120
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    segment_max_frames: int = 4
    text_hidden_size: int = 6144
    projector_hidden_size: int = 6144
    projector_bias: bool = True
    merger_bias: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name} must be true or false, got {value!r}")
                continue
            # bool is an int to Python, and no dimension.
            numeric = isinstance(
                value, (int, float) if field.type == "float" else int
            ) and not isinstance(value, bool)
            if not numeric or not 0 < value < float("inf"):
                raise ConfigError(f"{field.name} must be a positive {field.type}, got {value!r}")
            if value > _LARGEST.get(field.name, _LARGEST_SIZE):
                raise ConfigError(
                    f"{field.name} must be at most {_LARGEST.get(field.name, _LARGEST_SIZE)}, "
                    f"got {value!r}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.axis_dim == 0:
            raise ConfigError(f"head_dim must be at least 6 for 3D RoPE, got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def axis_dim(self) -> int:
        """Rotated channels per axis (time, height, width), an even number."""
        return 2 * ((self.head_dim // 3) // 2)

    @property
    def rope_dim(self) -> int:
        """Rotated channels of a head; the `head_dim - rope_dim` that follow pass through."""
        return 3 * self.axis_dim

    @property
    def patch_dim(self) -> int:
        """Values in one patch row, flattened in (channel, frame, row, column) order."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Patches merged into one image token."""
        return self.spatial_merge_size**2

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, in the order of the class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> EncoderConfig:
        """The inverse of `to_json`; use `config_from_dict` for a checkpoint's `config.json`."""
        if not isinstance(fields, dict):
            raise ConfigError(f"the encoder config must be an object, got {fields!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        if differing := sorted(set(fields) ^ names):
            raise ConfigError(f"unknown or missing encoder config field(s): {', '.join(differing)}")
        return cls(**fields)


Preset = Literal["tiny", "shallow", "full"]

PRESETS: dict[Preset, EncoderConfig] = {
    # Small enough for a laptop in seconds, with the released head_dim of 80 (78 rotated channels, 2
    # that pass through).
    "tiny": EncoderConfig(
        hidden_size=320,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=1280,
        text_hidden_size=512,
        projector_hidden_size=512,
    ),
    # The released widths and 4 of its 32 layers, 315 M parameters: what benchmarks on a CPU run.
    "shallow": EncoderConfig(num_hidden_layers=4),
    "full": EncoderConfig(),
}
"""Named dimensions for `--preset`."""


def config_from_file(path: Path) -> EncoderConfig:
    """Read a checkpoint's `config.json`.

    Raises:
        ConfigError: The file cannot be read or parsed, or `config_from_dict` refuses its content.
    """
    content = _content(path)
    try:
        return config_from_dict(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from error


def assumed_fields(path: Path) -> dict[str, Any]:
    """Values that a `config.json` leaves out, and that no tensor's shape gives away.

    Returns:
        Name -> the released checkpoint's value, which is taken in its place.

    Raises:
        ConfigError: The file cannot be read or parsed.
    """
    given = _given(_content(path))
    return {name: getattr(EncoderConfig(), name) for name in _IN_NO_SHAPE if name not in given}


_IN_NO_SHAPE = ("num_attention_heads", "rope_theta", "layer_norm_eps", "segment_max_frames")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json_from_file(path)
    except InputError as error:
        hint = "a checkpoint folder holds config.json" if error.reason == "missing" else None
        raise ConfigError(str(error), hint=hint, reason=error.reason) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def config_from_dict(config: Mapping[str, Any]) -> EncoderConfig:
    """The encoder's dimensions from a parsed `config.json`, in either spelling.

    Fields that a spelling leaves out take the released checkpoint's value, as transformers does
    when it saves only what differs from its defaults. Most wrong guesses cannot pass unseen, since
    every tensor's shape is checked; `assumed_fields` names those that could.

    Raises:
        ConfigError: A field is missing, malformed, given twice with different values, or names
            something this exporter does not implement.
    """
    found = _given(config)
    result = EncoderConfig(**found)
    head_dim = _section(config, "vision_config", required=True).get("head_dim")
    if head_dim not in (None, result.head_dim):
        raise ConfigError(
            f"vision_config.head_dim must be hidden_size / num_attention_heads = {result.head_dim}, got {head_dim!r}"
        )
    return result


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says, by the names of `EncoderConfig`."""
    vision = _section(config, "vision_config", required=True)
    text = _section(config, "text_config")
    compression = _section(vision, "img_token_compression_config", "vision_config.")
    compression = {**_section(config, "img_token_compression_config"), **compression}
    rope = _section(vision, "rope_parameters", "vision_config.")

    _require(vision, "vision_config.hidden_act", "gelu")
    _require(vision, "vision_config.position_embedding_type", "rope")
    _require(vision, "vision_config.rope_mode", "3d")
    _require(rope, "vision_config.rope_parameters.rope_type", "axial")
    _require(config, "projector_hidden_act", "gelu")
    _require(config, "vision_feature_layer", -1)
    _require(config, "vision_feature_select_strategy", "full")
    _require(
        compression,
        "vision_config.img_token_compression_config.image_token_compression_method",
        "patch_merge",
    )

    found: dict[str, Any] = {}
    for name in (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "num_channels",
        "patch_size",
        "layer_norm_eps",
    ):
        if vision.get(name) is not None:
            found[name] = vision[name]
    _merge(found, "spatial_merge_size", vision, compression)
    _merge(found, "temporal_patch_size", vision, compression)
    _merge(found, "rope_theta", vision, rope)
    for name, source, key in (
        ("segment_max_frames", vision, "vision_segment_max_frames"),
        ("text_hidden_size", text, "hidden_size"),
        ("projector_hidden_size", config, "projector_hidden_size"),
        ("projector_bias", config, "multimodal_projector_bias"),
        ("merger_bias", config, "patch_merge_bias"),
    ):
        if source.get(key) is not None:
            found[name] = source[key]
    return found


def _section(
    config: Mapping[str, Any], name: str, prefix: str = "", *, required: bool = False
) -> Mapping[str, Any]:
    section = config.get(name)
    if section is None:
        if required:
            raise ConfigError(
                f"{prefix}{name} is missing",
                hint="this is not the config.json of a MiniMax-M3-VL model",
            )
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{prefix}{name} must be an object, got {type(section).__name__}")
    return section


def _require(section: Mapping[str, Any], field: str, implemented: Any) -> None:
    value = section.get(field.rpartition(".")[2])
    if value is not None and value != implemented:
        raise ConfigError(f"{field}: only {implemented!r} is implemented, got {value!r}")


def _merge(found: dict[str, Any], name: str, *sections: Mapping[str, Any]) -> None:
    values = [section[name] for section in sections if section.get(name) is not None]
    if any(value != values[0] for value in values[1:]):  # NaN is not even itself
        raise ConfigError(f"vision_config gives {name} twice, as {values[0]!r} and {values[1]!r}")
    if values:
        found[name] = values[0]
