"""What an engine is made of: from TensorRT-RTX's builder, which needs no GPU, and from TensorRT's inspector.

The inspector runs on a stand-in: its JSON is of the form that NVIDIA's guide shows.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmvision_export.artifacts.companion_file import CompanionFile
from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.layer_counts import (
    LayerCounts,
    counts_from_layers,
    layers_of,
    layers_path,
)
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.profile import Profile, profiles_from_slots
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError
from mmvision_export.core.files import FileRecord
from mmvision_export.engine.build import build_engine
from mmvision_export.engine.engine_files import note_what_is_odd
from mmvision_export.engine.layer_report import (
    LISTING,
    layers_from_listing,
    report_from_inspector,
    report_from_listing,
)
from mmvision_export.graph.inspection import inspect, inspect_layers
from tests.support.configs import HEAD_DIM_80, copy_of
from tests.support.errors import refused
from tests.support.notes import Notes

PROFILE = Profile(min_patches=4, opt_patches=64, max_patches=256, max_images=8)
FILE = CompanionFile("x.layers.json", FileRecord.of(b"layers"))

# As TensorRT-RTX 1.7.1 writes it, shortened.
_MHA = (
    "Name: _gemm_mha_v2_myl0_17, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [2,-1,80], "
    "Strides: [80,160,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride "
    "order = [1,2,0] }, { Name: mask, Dimensions: [1,1,-1,-1], Strides: [-1,-1,-1,1], StrideOrder: "
    "[3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: "
    "[ { Name: out, Dimensions: [2,-1,80], Strides: [80,160,1], StrideOrder: [1,2,0], Datatype: Half, "
    "Format: (Linear) Row major linear format }], TacticName: _gemm_mha_v2_0x52db, StreamId: 0, "
    "Metadata: [ONNX Layer: layers.0.self_attn.VarlenAttention.attended_batch]"
)
_WAIT = (
    "Name: __mye1_myl2_4, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , "
    "StreamId: 1, EventId: 3, Metadata:"
)
_LISTING = f"{LISTING}{_MHA}\n{_WAIT}\n\nI/O Tensors:\nName: pixel_values, IOMode: Input"

# https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html
_INSPECTED = {
    "Layers": [
        {
            "Name": "layers.0.mlp.fc1 + gelu",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Dimensions": [64, 160], "Format/Datatype": "Half"}],
            "Outputs": [
                {
                    "Name": "y",
                    "Dimensions": [64, 320],
                    "Format/Datatype": "Row major linear FP16 format (kLINEAR)",
                }
            ],
            "TacticName": "sm80_xmma_gemm_f16f16",
        },
        {
            "Name": "layers.0.self_attn",
            "LayerType": "kgen",
            "Outputs": [{"Name": "y", "Format/Datatype": "BFloat16"}],
            "TacticName": "fmha_v2_flash_attention_bf16_S_80_sm89",
        },
        {"Name": "cast", "LayerType": "Reformat", "Outputs": [{"Format/Datatype": "FP32"}]},
        {"Name": "odd", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Posit"}]},
    ],
    "Bindings": ["pixel_values"],
}


def counts(layers: list[dict[str, Any]]) -> LayerCounts:
    return counts_from_layers(layers, file=FILE, source="engine inspector")


def test_a_builder_s_listing() -> None:
    first, second = layers_from_listing(_LISTING)
    assert (first["Name"], first["LayerType"]) == ("_gemm_mha_v2_myl0_17", "kgen")
    assert [tensor["Name"] for tensor in first["Inputs"]] == ["q", "mask"]
    assert first["Outputs"][0]["Dimensions"] == [2, -1, 80]
    assert first["Metadata"].endswith("VarlenAttention.attended_batch]")
    assert (second["EventId"], second["Metadata"], second["Outputs"]) == ("3", "", [])
    found = counts([first, second])
    assert found.kinds == {"kgen": 1, "wait": 1}
    assert found.precisions == {"kgen": {"fp16": 1}, "wait": {"none": 1}}
    assert found.fused_attention == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LayerType: ", "Type: "),
        ("Datatype: Half", "Half"),
        (_MHA, "a sentence"),
        (f"{_MHA}\n{_WAIT}\n", ""),
    ],
)
def test_a_listing_of_another_form_is_not_counted(before: str, after: str) -> None:
    with pytest.raises(EngineError):
        layers_from_listing(_LISTING.replace(before, after, 1))


def test_there_is_one_listing() -> None:
    assert len(layers_of(json.loads(report_from_listing([_LISTING])))) == 2
    for listings in ([], [_LISTING] * 2):
        with refused(EngineError, len(listings)):
            report_from_listing(listings)


class Inspected:
    """TensorRT as far as the inspector is concerned; `fail` names what gives nothing."""

    LayerInformationFormat = SimpleNamespace(JSON="JSON")

    def __init__(self, text: str, fail: str = "") -> None:
        self.text = text
        self.fail = fail
        self.engine_host_code_allowed = False

    def Runtime(self, logger: object) -> Inspected:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Inspected | None:
        assert (plan, self.engine_host_code_allowed) == (b"plan", True)
        return None if self.fail == "engine" else self

    def create_engine_inspector(self) -> Inspected | None:
        return None if self.fail == "inspector" else self

    def get_engine_information(self, form: str) -> str:
        assert form == "JSON"
        return self.text


def test_an_inspector_s_report_is_kept_as_it_is() -> None:
    text = json.dumps(_INSPECTED)
    assert report_from_inspector(Inspected(text), None, b"plan") == text.encode()
    found = counts(layers_of(json.loads(text)))
    assert (found.count, found.fused_attention) == (4, 1)
    assert found.kinds == {"kgen": 2, "gemm": 1, "Reformat": 1}
    assert found.precisions == {
        "kgen": {"bf16": 1, "other": 1},
        "gemm": {"fp16": 1},
        "Reformat": {"fp32": 1},
    }
    assert "4 layers: 2 kgen, 1 gemm, 1 Reformat; 1 of fused attention" in str(found)


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        (["Int8"], ["Half"], "int8"),
        (["FP8", "Half"], ["Half"], "fp8"),
        (["Half"], ["Int8"], "fp16"),  # it quantises
        (["Half", "Int32"], ["Half"], "fp16"),
        (["Bool", "Int32"], ["Half"], "int32"),
        (["Row major linear BF16 format (kLINEAR)"], ["Float"], "bf16"),
        (["BFloat16"], [], "bf16"),
        ([], ["Float"], "fp32"),
        (["UInt8"], ["Half"], "other"),
        ([], [], "none"),
    ],
)
def test_the_type_of_a_layer(inputs: list[str], outputs: list[str], expected: str) -> None:
    layer = {
        "LayerType": "gemm",
        "Inputs": [{"Datatype": each} for each in inputs],
        "Outputs": [{"Format/Datatype": each} for each in outputs],
    }
    assert counts([layer]).precisions == {"gemm": {expected: 1}}


def test_an_engine_without_details_has_names_only() -> None:
    found = counts(layers_of({"Layers": ["fc1", "_gemm_mha_v2_myl0_17"]}))
    assert (found.kinds, found.fused_attention) == ({"unknown": 2}, 1)


@pytest.mark.parametrize(
    ("text", "fail"),
    [
        ("no JSON", ""),
        ("[]", ""),
        ('{"Layers": [1]}', ""),
        ('{"Layers": []}', "engine"),
        ('{"Layers": []}', "inspector"),
    ],
)
def test_what_is_no_report(text: str, fail: str) -> None:
    with pytest.raises(EngineError):
        report_from_inspector(Inspected(text, fail), None, b"plan")


def test_counts_that_do_not_add_up() -> None:
    found = counts(layers_of(_INSPECTED))
    wrong: list[dict[str, Any]] = [{"count": 5}, {"kinds": {"kgen": 4}}, {"precisions": {}}]
    for changes in wrong:
        with pytest.raises(ManifestError):
            dataclasses.replace(found, **changes)


@pytest.fixture(scope="module")
def directory(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(exported, tmp_path_factory.mktemp("layers") / "m")


def build(directory: Path, notes: Notes | None = None, **options: Any) -> tuple[Path, EngineRecord]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return build_engine(
        directory,
        Manifest.read(directory),
        **{"profiles": [PROFILE], "force": True, **options},
        backend="tensorrt-rtx",
        compute_capabilities=[ComputeCapability(8, 9)],
        progress=notes,
    )


def test_a_float16_engine_has_one_fused_kernel_for_each_attention(directory: Path) -> None:
    """Counted in what the builder made, apart from what it was permitted to make."""
    slots = profiles_from_slots([(1, 64), (2, 16)], 2, HEAD_DIM_80)
    for sizes in ({}, {"profiles": slots, "attention": "uniform"}):
        notes = Notes()
        engine, record = build(directory, notes, precision="fp16", **sizes)
        assert record.attention.fused
        assert record.layers is not None
        assert record.layers.source == "builder"
        expected = HEAD_DIM_80.num_hidden_layers * len(record.profiles)
        assert record.layers.fused_attention == expected
        assert record.layers.count > expected
        assert not [note for note in notes.notes if "fused" in note or "report of" in note]
        assert EngineRecord.read(engine) == record
        assert len(record.layers.read(engine)) == record.layers.count


def test_control_a_float32_engine_has_none(directory: Path) -> None:
    _, record = build(directory)
    assert record.layers is not None
    assert record.layers.fused_attention == 0
    assert "fp16" not in {each for row in record.layers.precisions.values() for each in row}
    # Had it been asked for, somebody would be told.
    attention = dataclasses.replace(record.attention, fused=True)
    notes = Notes()
    note_what_is_odd(dataclasses.replace(record, attention=attention), notes)
    assert any(record.layers.file.name in note for note in notes.notes)


def test_inspecting_an_engine(directory: Path) -> None:
    engine, record = build(directory, precision="fp16")
    assert record.layers is not None
    found = inspect_layers(engine)
    assert (found["kind"], found["file"]) == ("layers", engine.name)
    assert found["report"] == layers_path(engine).name
    assert len(found["layers"]) == found["count"] == record.layers.count
    assert any("VarlenAttention" in layer["from"] for layer in found["layers"])
    assert inspect(engine)["layers"]["fused_attention"] == record.layers.fused_attention
    report = layers_path(engine)
    report.write_bytes(report.read_bytes().replace(b"kgen", b"gemm"))
    for look in (inspect, inspect_layers):
        with refused(ManifestError, report, "sha256"):
            look(engine)
    with refused(ManifestError, directory):
        inspect_layers(directory)


def test_a_builder_that_says_it_otherwise_costs_no_engine(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the layers of the engine that had this name do not stay."""
    engine, _ = build(directory, precision="fp16")
    assert layers_path(engine).exists()
    monkeypatch.setattr("mmvision_export.engine.builder.LISTING", "Something else")
    notes = Notes()
    engine, record = build(directory, notes, precision="fp16")
    assert record.layers is None
    assert not layers_path(engine).exists()
    assert any("no report of its layers" in note for note in notes.notes)
    with refused(ManifestError, engine):
        inspect_layers(engine)
