"""The encoder's weights from a checkpoint folder, and no others.

Three layouts of names are understood, the released one (also SGLang's and vLLM's), transformers'
and NeMo's; all are mapped to the released names, which are the encoder's own. The whole model has
some 428 billion parameters: the index tells which shards have vision tensors, no other shard is
opened, and in those no other tensor is read. Only safetensors are read: unpickling a file runs code
from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmvision_export.core.errors import CheckpointError, InputError
from mmvision_export.core.files import json_from_file
from mmvision_export.core.progress import Progress
from mmvision_export.core.regular_file import opened_regular_file
from mmvision_export.models.minimax_m3_vl.config import (
    EncoderConfig,
    assumed_fields,
    config_from_file,
)
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule

__all__ = [
    "Checkpoint",
    "checkpoint_from_folder",
    "digest_of_tensor",
    "digest_of_tensors",
    "encoder_from_state_dict",
    "released_name",
    "vision_shards",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TOWER = "vision_tower.vision_model"
# Layout by layout: prefix as stored -> prefix as released. The first that fits decides.
_PREFIXES = (
    # NeMo keeps projector and merger inside the tower.
    ("vision_tower.multi_modal_projector.", "multi_modal_projector."),
    ("vision_tower.patch_merge_mlp.", "patch_merge_mlp."),
    ("vision_tower.vision_model.", f"{_TOWER}."),
    # transformers.
    ("vision_tower.embeddings.proj.", f"{_TOWER}.embeddings.patch_embedding."),
    ("vision_tower.layers.", f"{_TOWER}.encoder.layers."),
    ("vision_tower.", f"{_TOWER}."),
    ("multi_modal_projector.merge_linear_", "patch_merge_mlp.linear_"),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("patch_merge_mlp.", "patch_merge_mlp."),
    # NeMo's module on its own.
    ("vision_model.", f"{_TOWER}."),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was loaded.

    Attributes:
        config: The encoder's dimensions.
        state_dict: Weights under the released names.
        sha256: Digest over every tensor's name, stored dtype, stored shape and stored bytes, in
            order of name.
        shards: File names that were opened.
    """

    config: EncoderConfig
    state_dict: dict[str, Tensor]
    sha256: str
    shards: list[str]


def released_name(name: str) -> str | None:
    """A stored tensor's released name, or None if it is not part of the vision encoder."""
    name = name.removeprefix("model.")
    for stored, released in _PREFIXES:
        if name.startswith(stored):
            return released + name.removeprefix(stored)
    return None


def vision_shards(names_by_tensor: Mapping[str, str]) -> list[str]:
    """The shard files, sorted, that hold a vision tensor, of an index's `weight_map`."""
    return sorted(
        {file for tensor, file in names_by_tensor.items() if released_name(tensor) is not None}
    )


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of `model.safetensors.index.json`: file name by tensor name.

    Raises:
        CheckpointError: The file is malformed, or names a shard outside its folder or not in
            safetensors.
    """
    try:
        weight_map = json_from_file(path)["weight_map"]
        well_formed = all(isinstance(file, str) for file in weight_map.values())
    except InputError as error:
        raise CheckpointError(str(error), reason=error.reason) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors index: {error!r}", reason="malformed"
        ) from error
    if not well_formed:
        raise CheckpointError(
            f"{path}: not a safetensors index: a file name is not a string", reason="malformed"
        )
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: a shard must be a .safetensors file beside the index, got {file!r}",
                reason="unsafe",
            )
    return dict(weight_map)


def checkpoint_from_folder(
    folder: Path, *, dtype: torch.dtype, progress: Progress | None = None
) -> Checkpoint:
    """Load the vision encoder's weights, each tensor converted to `dtype` as it is read.

    Args:
        folder: Holds `config.json` and either `model.safetensors.index.json` with its shards or
            `model.safetensors`.
        dtype: Type of the loaded weights.
        progress: Told the tensors read.

    Raises:
        ConfigError: The config is missing or not implemented.
        CheckpointError: Files are missing or malformed, or the tensors are not exactly the
            encoder's: the error lists all that are missing, unexpected, of another shape, or not
            finite.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint folder",
            hint="name a folder or a hub id with --checkpoint",
            reason="missing",
        )
    config = config_from_file(folder / CONFIG)
    shards = _shards_of(folder)
    reader = _TensorReader(config, dtype)
    progress = progress or Progress()
    if assumed := assumed_fields(folder / CONFIG):
        values = ", ".join(f"{name} {value}" for name, value in assumed.items())
        progress.note(
            f"{CONFIG} leaves out fields that no weight determines; their released values are used: {values}"
        )
    progress.step("reading weights", total=len(reader.expected))
    for shard in shards:
        for tensor in _vision_tensors(folder / shard):
            if reader.take(tensor):
                progress.advance()
    reader.refuse_problems(folder)
    return Checkpoint(config, reader.state, digest_of_tensors(reader.digests), shards)


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    """A vision tensor in an open shard: its values are not read yet.

    Attributes:
        stored: Its name in the shard.
        name: Its released name.
    """

    stored: str
    name: str
    shape: torch.Size
    read: Callable[[], Tensor]


def _vision_tensors(shard: Path) -> Iterator[_StoredTensor]:
    """The vision tensors of a shard. Each can be read until the next is asked for.

    Raises:
        CheckpointError: The shard is missing, or not readable.
    """
    with _shard_errors(shard):
        opened_regular_file(shard).close()  # safe_open waits for ever at a FIFO
    with _shard_errors(shard), safe_open(shard, framework="pt") as file:
        for stored in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            name = released_name(stored)
            if name is not None:
                shape = torch.Size(file.get_slice(stored).get_shape())
                yield _StoredTensor(
                    stored, name, shape, functools.partial(_read, shard, file, stored)
                )


def _read(shard: Path, file: Any, stored: str) -> Tensor:
    with _shard_errors(shard):
        tensor: Tensor = file.get_tensor(stored)
    return tensor


@contextlib.contextmanager
def _shard_errors(shard: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        if error.reason != "missing":
            raise CheckpointError(str(error), reason=error.reason) from error
        raise CheckpointError(
            f"{shard} is missing", hint="it holds vision tensors: download it", reason="missing"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard}: not a readable safetensors file: {error}", reason="unreadable"
        ) from error


class _TensorReader:
    """Takes stored tensors one by one, and notes what is wrong with them.

    Attributes:
        expected: Shape by name of every parameter of the encoder.
        state: What was taken, in the type asked for.
        digests: Of the stored tensors; empty for one that was found but not taken.
    """

    def __init__(self, config: EncoderConfig, dtype: torch.dtype) -> None:
        self.expected = _expected_shapes(config)
        self.state: dict[str, Tensor] = {}
        self.digests: dict[str, bytes] = {}
        self._config = config
        self._dtype = dtype
        self._unexpected: list[str] = []
        self._mis_shaped: list[str] = []
        self._not_finite: list[str] = []
        self._out_of_range: list[str] = []

    def take(self, tensor: _StoredTensor) -> bool:
        """Whether the tensor is one of the encoder's, and of a shape and type it can have."""
        stored, name = tensor.stored, tensor.name
        if name not in self.expected or name in self.digests:
            self._unexpected.append(stored)
            return False
        self.digests[name] = b""
        shapes = _stored_shapes(name, self.expected[name], self._config)
        if tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self._mis_shaped.append(f"{stored}: expected {wanted}, got {list(tensor.shape)}")
            return False
        values = tensor.read()
        if values.dtype not in _FLOAT_TYPES:
            self._mis_shaped.append(
                f"{stored}: expected bfloat16, float16 or float32, got {values.dtype}"
            )
            return False
        self.digests[name] = digest_of_tensor(values)
        # A copy in any case, so that no tensor keeps the shard mapped.
        self.state[name] = values.to(self._dtype, copy=True).reshape(self.expected[name])
        if not _is_finite(values):
            self._not_finite.append(stored)
        elif not _is_finite(self.state[name]):
            self._out_of_range.append(f"{stored} (largest magnitude {values.abs().max():g})")
        return True

    def refuse_problems(self, folder: Path) -> None:
        """Raise one error for all that was wrong, if anything was."""
        problems = {
            "missing": sorted(set(self.expected) - set(self.digests)),
            "unexpected": self._unexpected,
            "mis-shaped": self._mis_shaped,
            "not-finite": self._not_finite,
        }
        lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        if lines:
            raise CheckpointError(
                "\n  ".join([f"{folder}: the tensors are not those of the config", *lines])
            )
        if self._out_of_range:
            raise CheckpointError(
                f"{folder}: weights outside the range of {self._dtype}: "
                f"{', '.join(self._out_of_range)}",
                hint="export with --bf16, whose range is float32's",
            )


def encoder_from_state_dict(
    config: EncoderConfig, state_dict: Mapping[str, Tensor]
) -> VisionEncoderModule:
    """An encoder in evaluation mode that holds the given tensors themselves, not copies."""
    with torch.device("meta"):
        encoder = VisionEncoderModule(config)
    encoder.load_state_dict(dict(state_dict), assign=True)
    return encoder.eval().requires_grad_(False)


def _shards_of(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        if shards := vision_shards(read_index(folder / INDEX)):
            return shards
        raise CheckpointError(
            f"{folder / INDEX} lists no vision tensors", hint="is this a MiniMax-M3-VL checkpoint?"
        )
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has no safetensors, only {', '.join(pickles)}: pickled files are refused, "
            f"because loading one runs code from it",
            hint="convert the checkpoint with save_pretrained(..., safe_serialization=True)",
            reason="unsafe",
        )
    raise CheckpointError(f"{folder} holds neither {INDEX} nor {SINGLE}", reason="missing")


def _expected_shapes(config: EncoderConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in VisionEncoderModule(config).named_parameters()}


def _stored_shapes(name: str, expected: torch.Size, config: EncoderConfig) -> list[torch.Size]:
    if not name.endswith("patch_embedding.weight"):
        return [expected]
    # Stored as a convolution kernel, which flattens to the matrix in the order of its axes.
    side = config.patch_size
    kernel = torch.Size(
        (config.hidden_size, config.num_channels, config.temporal_patch_size, side, side)
    )
    return [kernel, expected]


def _is_finite(tensor: Tensor) -> bool:
    # The extremes rather than isfinite(), which makes temporaries as large as the tensor. NaN is
    # passed on to both.
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())


def digest_of_tensors(digests: Mapping[str, bytes]) -> str:
    """One hexadecimal SHA-256 for many named tensors, whatever order they were read in."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(name.encode() + digests[name])
    return whole.hexdigest()


def digest_of_tensor(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and values."""
    header = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return hashlib.sha256(
        header + hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()
    ).digest()
