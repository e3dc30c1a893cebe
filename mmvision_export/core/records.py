"""Records: dataclasses that are JSON files, read and checked by the annotations of their fields.

A field's annotation is what its value must be: `str`, `int`, `float`, `bool`, `Any`, a `Literal`, a
list, tuple or dict of these, an optional one, or a dataclass. A class with a JSON form of its own
has `from_json` and `to_json`. A field with a default may be missing, any other must be there, and
what is no field is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmvision_export.core.errors import ManifestError, MmvisionError
from mmvision_export.core.files import read_json
from mmvision_export.core.numbers import is_finite_number

__all__ = ["json_from_record", "json_text", "parsed_record", "read_record", "record_from_json"]

_Record = TypeVar("_Record")

_CHECKSUM = "content_sha256"


def read_record(
    cls: type[_Record],
    path: Path,
    *,
    what: str,
    formats: Sequence[int],
    hint: str,
    upgraded: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _, content: content,
) -> _Record:
    """Read a record's file.

    Args:
        cls: Class of the record.
        path: The file.
        what: What an error calls it, as "a manifest".
        formats: Format numbers that can be read, ascending.
        hint: How to get a file that can be read.
        upgraded: Makes the last format of the content of an earlier one, given the format number.

    Raises:
        ManifestError: The file is missing, no JSON, of another format, or a field is wrong.
    """
    return parsed_record(
        cls, read_json(path), path, what=what, formats=formats, hint=hint, upgraded=upgraded
    )


def parsed_record(
    cls: type[_Record],
    content: Any,
    path: Path,
    *,
    what: str,
    formats: Sequence[int],
    hint: str,
    upgraded: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _, content: content,
) -> _Record:
    """A record from the JSON value of its file; for the rest see `read_record`.

    Raises:
        ManifestError: It is no object, of another format, changed, or a field is wrong.
    """
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: expected a JSON object, got {type(content).__name__}")
    content = dict(content)
    _refuse_damage(path, content.pop(_CHECKSUM, None), content, hint)
    form = content.pop("format", None)
    # True is 1 to Python.
    if isinstance(form, bool) or form not in formats:
        known = " or ".join(map(str, formats))
        raise ManifestError(f"{path}: {what} must be of format {known}, got {form!r}", hint=hint)
    try:
        return record_from_json(cls, upgraded(form, content))
    except MmvisionError as error:
        raise ManifestError(f"{path}: malformed: {error}", hint=hint, reason="malformed") from error


def record_from_json(cls: type[_Record], content: Any, *, name: str = "the record") -> _Record:
    """A dataclass from the JSON value of all its fields.

    Args:
        cls: A dataclass.
        content: As `json.loads` gives it.
        name: What an error calls the value.

    Raises:
        ManifestError: A field is missing, unknown or of another type; names it.
        MmvisionError: Whatever the class raises for a value that it refuses.
    """
    if not isinstance(content, dict):
        raise ManifestError(f"{name} must be an object, got {content!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(content)):
        raise ManifestError(f"{name} lacks {', '.join(missing)}")
    if unknown := sorted(set(content) - set(fields)):
        raise ManifestError(f"{name} has unknown field(s) {', '.join(unknown)}")
    hints = get_type_hints(cls)
    return cls(**{key: _checked(hints[key], value, key) for key, value in content.items()})


def json_from_record(value: Any) -> Any:
    """The JSON value that `record_from_json` reads back."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return {
            field.name: json_from_record(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, (list, tuple)):
        return [json_from_record(item) for item in value]
    if isinstance(value, dict):
        return {key: json_from_record(item) for key, item in value.items()}
    return value


def json_text(record: Any, *, form: int) -> str:
    """A record's file, with a checksum of its content, which `read_record` compares.

    The checksum finds damage. It proves nothing about the maker of the file.
    """
    content = {"format": form, **json_from_record(record)}
    content[_CHECKSUM] = _checksum(content)
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    # Not of the text: whoever formats the file anew changes nothing.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _refuse_damage(path: Path, checksum: Any, content: dict[str, Any], hint: str) -> None:
    """Records of earlier versions have no checksum."""
    if checksum is not None and checksum != _checksum(content):
        raise ManifestError(
            f"{path} was changed or damaged: its content does not have the sha256 that it states",
            hint=f"copy it again, or {hint}",
            reason="malformed",
        )


def _checked(kind: Any, value: Any, name: str) -> Any:
    """A value of the annotated type, made from its JSON form."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        (kind,) = (option for option in parameters if option is not type(None))
        return _checked(kind, value, name)
    if origin is Literal:
        return _literal(parameters, value, name)
    if origin in (list, tuple):
        items = _plain(list, value, name)
        return origin(_checked(parameters[0], item, f"{name}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        entries = _plain(dict, value, name)
        return {
            key: _checked(parameters[1], item, f"{name}[{key!r}]") for key, item in entries.items()
        }
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return record_from_json(kind, value, name=name)
    return _plain(kind, value, name)


def _literal(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if value not in choices:
        raise ManifestError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


_TITLES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _plain(kind: type, value: Any, name: str) -> Any:
    # True is an int to Python, and no number in JSON.
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not (is_finite_number(value) if kind is float else fits):
        raise ManifestError(f"{name} must be {_TITLES[kind]}, got {value!r}")
    return value
