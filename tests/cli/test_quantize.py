"""What `mmvision quantize` says: the plan, the JSON form, and warnings of thin evidence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.graph.load import load_graph
from mmvision_export.quantize.units import units_of
from tests.support.command import Command


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "small")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return folder


def test_a_dry_run_says_which_images_serve_for_what_and_writes_nothing(
    model: Path, photos: Path, mmvision: Command
) -> None:
    before = sorted(path.name for path in model.iterdir())
    options = ["quantize", "--int8", "--model", str(model), "--image", str(photos), "--dry-run"]
    plan = json.loads(mmvision(*options, "--json").out)
    assert plan["kind"] == "quantization"
    assert plan["dry_run"] is True
    assert plan["units"] == len(units_of(load_graph(model / GRAPH)))
    everything = {*plan["calibration"], *plan["held_out"]}
    assert everything == {str(photos / f"{number}.png") for number in range(5)}
    assert len(plan["calibration"]) + len(plan["held_out"]) == 5
    words = mmvision(*options)
    assert words.code == 0
    assert all(Path(name).name in words.out for name in everything)
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_dry_run_refuses_what_the_run_would(model: Path, photos: Path, mmvision: Command) -> None:
    for wrong in (["--image", str(photos / "0.png")], ["--min-cosine", "2"]):
        result = mmvision("quantize", "--int8", "--model", str(model), "--dry-run", *wrong)
        assert result.code == 1


def test_the_json_form_is_the_manifests_and_thin_evidence_is_warned_of(
    model: Path, photos: Path, mmvision: Command
) -> None:
    result = mmvision(
        "quantize", "--cpu-int8", "--model", str(model), "--image", str(photos), "--json"
    )
    assert result.code == 0
    printed = json.loads(result.out)
    assert printed.pop("kind") == "quantization"
    assert printed.pop("path") == str(model / "model.cpu-int8.onnx")
    assert printed == Manifest.read(model).quantization["model.cpu-int8.onnx"]
    assert "2 photographs were held out" in result.err
    again = mmvision(
        "quantize", "--cpu-int8", "--model", str(model), "--image", str(photos), "--quiet"
    )
    assert again.code == 1
    assert "--force" in again.err


def test_few_operations_in_8_bit_are_warned_of(
    model: Path, mmvision: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["quantize", "--cpu-int8", "--model", str(model), "--force"]
    assert "of the operations are in 8 bit" not in mmvision(*options).err  # the control
    monkeypatch.setattr("mmvision_export.cli.quantize._LITTLE", 1.1)
    assert "of the operations are in 8 bit" in mmvision(*options).err
