"""Names of the files that an ONNX graph reads its weights from, without onnx.

A graph is data, and data may come from anybody. A runtime opens each file that a tensor of the
graph names, so that these names must be known before a runtime sees the graph. A machine that only
runs a graph has no onnx: this module walks the protobuf wire format
(https://protobuf.dev/programming-guides/encoding) along the fields of `onnx.proto` that lead to a
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mmvision_export.core.errors import ManifestError

__all__ = ["external_locations"]

# Field numbers of onnx.proto (IR version 13): for each message, the fields that lead to a tensor.
_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalDataEntry"},
}
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


class _Field(NamedTuple):
    number: int
    content: memoryview | None
    """Of a length-delimited field; None of a number."""


def external_locations(model: bytes | memoryview) -> set[str]:
    """The `location` of each external tensor of an ONNX model.

    Tensors in functions, in attributes and in nested graphs count, and so do sparse ones.

    Args:
        model: A serialized `ModelProto`.

    Returns:
        Locations as the model gives them: paths, or anything else.

    Raises:
        ManifestError: The bytes are no protobuf message, or a location is no text.
    """
    found: set[str] = set()
    # A stack of our own: a hostile graph nests deeper than Python's.
    waiting = [("Model", memoryview(model))]
    while waiting:
        kind, content = waiting.pop()
        if kind == "ExternalDataEntry":
            found |= _locations_of_entry(content)
            continue
        children = _CHILDREN[kind]
        waiting.extend(
            (children[field.number], field.content)
            for field in _fields(content)
            if field.number in children and field.content is not None
        )
    return found


def _locations_of_entry(content: memoryview) -> set[str]:
    """All values of an entry that says `location` anywhere: a parser takes the last of several."""
    keys: list[bytes] = []
    values: list[bytes] = []
    for field in _fields(content):
        if field.content is not None and field.number in (_KEY, _VALUE):
            (keys if field.number == _KEY else values).append(bytes(field.content))
    if b"location" not in keys:
        return set()
    try:
        return {value.decode("utf-8") for value in values or [b""]}
    except UnicodeDecodeError:
        raise ManifestError(
            f"the graph names a weight file by something other than text: {values!r}",
            reason="unsafe",
        ) from None


def _fields(message: memoryview) -> Iterator[_Field]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        content = None
        if wire == _VARINT:
            _, position = _varint(message, position)
        elif wire in _FIXED_SIZES:
            position += _FIXED_SIZES[wire]
        elif wire == _BYTES:
            size, position = _varint(message, position)
            content = message[position : position + size]
            position += size
        else:
            raise _malformed(f"field {number} is of wire type {wire}")
        if position > len(message):
            raise _malformed(f"field {number} is longer than its message")
        yield _Field(number, content)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if position + index >= len(message):
            break
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _malformed("a number has no end")


def _malformed(what: str) -> ManifestError:
    return ManifestError(f"the graph is not an ONNX model: {what}", reason="malformed")
