"""What a deployer chooses of a plan: its words in a file's name, its limits, and sizes with units."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.build_options import (
    DEFAULT_OPTIONS,
    BuildOptions,
    bytes_from_size,
    size_text,
)
from mmvision_export.artifacts.build_target import TensorRTVersion
from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.artifacts.engine_record import EngineRecord, sidecar_path
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.core.records import json_from_record, record_from_json
from tests.support.engines import write_engine
from tests.support.errors import refused

EVERY: tuple[dict[str, Any], ...] = (
    {"workspace_bytes": 1 << 29},
    {"workspace_bytes": 1 << 30},
    {"optimization_level": 0},
    {"optimization_level": 5},
    {"version_compatible": True},
    {"hardware": "ampere-plus"},
    {"hardware": "same-compute-capability"},
    {"strip_weights": True},
    {"refit": True},
    {"weight_streaming": True},
)


def test_each_choice_has_words_of_its_own() -> None:
    """So that engines of two choices never have one name."""
    options = [DEFAULT_OPTIONS, *(BuildOptions(**each) for each in EVERY)]
    options.append(BuildOptions(strip_weights=True, refit=True))
    words = [each.words for each in options]
    assert words[0] == ()
    assert len(set(words)) == len(words)
    assert words[1] == ("workspace512m",)
    assert words[-1] == ("stripped", "refit")


@pytest.mark.parametrize("given", EVERY)
def test_options_are_read_back(given: dict[str, Any]) -> None:
    options = BuildOptions(**given)
    assert record_from_json(BuildOptions, json_from_record(options)) == options != DEFAULT_OPTIONS


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"optimization_level": -1}, "0 to 5"),
        ({"hardware": "hopper-plus"}, "ampere-plus"),
    ],
)
def test_what_is_out_of_range(given: dict[str, Any], fact: str) -> None:
    with refused(EngineError, fact):
        BuildOptions(**given)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("4G", 4 << 30), ("1.5GiB", 3 << 29), (" 16 k ", 16 << 10)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_from_size(text) == size
    assert bytes_from_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "512", "512MB", "-1G", "0G", "four G", "1e3M"])
def test_sizes_without_a_unit_or_a_value(text: str) -> None:
    """A bare number is bytes to one tool and megabytes to another."""
    with refused(EngineError, repr(text)):
        bytes_from_size(text)


def test_a_sidecar_from_before_there_were_options(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    text = sidecar_path(engine).read_text()
    content = json.loads(text)
    for name in ("options", "refit_graph", "layers", "content_sha256"):
        del content[name]
    sidecar_path(engine).write_text(json.dumps(content))
    record = EngineRecord.read(engine)
    assert (record.options, record.refit_graph, record.layers) == (DEFAULT_OPTIONS, None, None)


@pytest.mark.parametrize(
    ("built", "here", "loads"),
    [
        ("10.3.0.26", "10.3.0.26", True),
        ("10.3.0.26", "10.13.3.9", True),
        ("10.13.3.9", "10.3.0.26", False),
        ("10.13.3.9", "11.0.0.1", False),
        ("10.3.0.26", "10.3.0.30", True),
    ],
)
def test_releases_that_load_a_version_compatible_engine(
    tmp_path: Path, built: str, here: str, loads: bool
) -> None:
    record = EngineRecord.read(write_engine(tmp_path, tensorrt_version=TensorRTVersion(built)))
    compatible = dataclasses.replace(record, options=BuildOptions(version_compatible=True))
    assert compatible.loads_in(TensorRTVersion(here)) is loads
    assert record.loads_in(TensorRTVersion(here)) is (built == here)


def test_gpus_that_run_an_engine_for_ampere_and_later(tmp_path: Path) -> None:
    record = EngineRecord.read(write_engine(tmp_path))
    wide = dataclasses.replace(record, options=BuildOptions(hardware="ampere-plus"))
    gpus = [ComputeCapability.parse(each) for each in ("7.5", "8.0", "8.7", "8.9", "9.0", "11.0")]
    assert [wide.runs_on(each) for each in gpus] == [False, True, False, True, True, False]
    assert [record.runs_on(each) for each in gpus] == [False, False, False, True, False, False]


def test_an_engine_that_takes_weights_has_the_graph_for_it(tmp_path: Path) -> None:
    record = EngineRecord.read(write_engine(tmp_path))
    graph = CompanionFile("x.refit.onnx", FileRecord.of(b"graph"))
    for options, file in ((BuildOptions(refit=True), None), (DEFAULT_OPTIONS, graph)):
        with refused(ManifestError, "refit_graph"):
            dataclasses.replace(record, options=options, refit_graph=file)


def test_a_file_beside_an_engine_is_the_one_that_was_written_with_it(tmp_path: Path) -> None:
    engine = tmp_path / "x.engine"
    companion = CompanionFile("x.layers.json", FileRecord.of(b"layers"))
    path = tmp_path / companion.name
    with refused(ManifestError, path, reason="missing"):
        companion.content(engine)
    path.write_bytes(b"layers")
    assert companion.content(engine) == b"layers"
    path.write_bytes(b"lawyer")
    with refused(ManifestError, path, "sha256"):
        companion.content(engine)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with refused(ManifestError, path, reason="unsafe"):
        companion.content(engine)
    with refused(ManifestError, "../x", reason="unsafe"):
        CompanionFile("../x", companion.record)
