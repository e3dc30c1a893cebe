"""Records are read by the annotations of their fields, and written so that they are read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.records import json_text, read_record, record_from_json
from tests.support.errors import refused
from tests.support.records import content_of


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    kind: Literal["large", "small"]
    is_whole: bool
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    gpus: list[ComputeCapability]
    anything: dict[str, Any]
    spare: Part | None = None


RECORD = Record(
    "a",
    "small",
    True,
    (Part(1), Part(2, 0.25)),
    {"b": Part(3, 1)},
    [ComputeCapability(8, 9)],
    {"deep": [1, {"er": None}]},
)


def read(path: Path, **changes: Any) -> Record:
    content = {**content_of(json_text(RECORD, form=2)), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    return read_record(Record, path, what="a test", formats=(1, 2), hint="make it again")


def test_round_trip(tmp_path: Path) -> None:
    assert read(tmp_path / "record.json") == RECORD
    spare = dataclasses.replace(RECORD, spare=Part(4))
    assert read(tmp_path / "record.json", spare={"size": 4}) == spare
    assert read(tmp_path / "record.json", spare="gone") == RECORD
    assert read(tmp_path / "record.json", format=1) == RECORD


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("name", 1, "name"),
        ("name", None, "name"),
        ("name", "gone", "name"),
        ("other", 1, "other"),
        ("kind", "medium", "kind"),
        ("is_whole", 1, "is_whole"),
        ("parts", {"size": 1}, "parts"),
        ("parts", [{"size": True}], "size"),
        ("parts", [{"size": 1.0}], "size"),
        ("parts", [{"size": 1, "share": "0.5"}], "share"),
        ("parts", [{"size": 1, "share": 10**400}], "share"),
        ("parts", [{"size": 1, "share": float("nan")}], "share"),
        ("parts", [{"size": 1, "share": True}], "share"),
        ("parts", [{"share": 0.5}], "size"),
        ("parts", ["x"], "parts[0]"),
        ("by_name", [], "by_name"),
        ("by_name", {"b": 1}, "by_name['b']"),
        ("gpus", ["ada"], "'ada'"),
        ("anything", [], "anything"),
        ("spare", 1, "spare"),
        ("format", 3, "3"),
        ("format", True, "True"),
        ("format", "gone", "None"),
    ],
)
def test_what_is_wrong_is_named(field: str, value: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(ManifestError) as caught:
        read(path, **{field: value})
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
    assert caught.value.hint == "make it again"


def test_damage_that_is_still_a_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = json_text(RECORD, form=2)
    path.write_text(json.dumps(json.loads(text)))  # laid out differently, nothing else
    assert read_record(Record, path, what="a test", formats=(2,), hint="make it again") == RECORD
    path.write_text(text.replace("0.25", "0.26"))
    with refused(ManifestError, path, reason="malformed"):
        read_record(Record, path, what="a test", formats=(2,), hint="make it again")


def test_earlier_formats_are_upgraded(tmp_path: Path) -> None:
    def upgraded(form: int, content: dict[str, Any]) -> dict[str, Any]:
        return {"size": content["bytes"]} if form == 1 else content

    path = tmp_path / "part.json"
    for content in ({"format": 1, "bytes": 7}, {"format": 2, "size": 7}):
        path.write_text(json.dumps(content))
        part = read_record(
            Part, path, what="a part", formats=(1, 2), hint="make it again", upgraded=upgraded
        )
        assert part == Part(7)


def test_a_record_is_an_object() -> None:
    with refused(ManifestError, "the part"):
        record_from_json(Part, [1], name="the part")
