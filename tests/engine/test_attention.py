"""Which attention an engine gets, and the graph its parser sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mmvision_export.artifacts.build_target import BuildTarget, TensorRTVersion
from mmvision_export.artifacts.engine_record import EngineAttention
from mmvision_export.artifacts.library_record import library_record_path
from mmvision_export.artifacts.plugin_library import PluginLibraryRecord
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import EngineError, ManifestError
from mmvision_export.core.files import file_record
from mmvision_export.core.progress import Progress
from mmvision_export.core.trust import UntrustedError, record_built
from mmvision_export.engine.attention import (
    Lowering,
    attention_body_for_tensorrt,
    choose_lowering,
    lowered_model,
)
from mmvision_export.engine.choices import SLOT_WAYS
from tests.support.configs import HEAD_DIM_48, HEAD_DIM_80
from tests.support.errors import refused


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A file with the record of a library: choosing reads no more."""
    import platform

    path = tmp_path / "libmmvision_plugins.so"
    path.write_bytes(b"library")
    PluginLibraryRecord(
        library=file_record(path),
        machine=platform.machine(),
        sms=[80, 87],
        head_dims=[64, 80],
        dtypes=["fp16", "bf16"],
        versions={"tensorrt headers": "10.3"},
    ).write(library_record_path(path))
    return path


def target_for(version: str = "10.3.0.30", **changes: Any) -> BuildTarget:
    fields: dict[str, Any] = {
        "backend": "tensorrt",
        "tensorrt_version": TensorRTVersion(version),
        "platform": "linux-aarch64",
        "compute_capabilities": (ComputeCapability(8, 7),),
        "precision": "fp16",
        "opset": 23,
    }
    return BuildTarget(**{**fields, **changes})


def choose(way: str, library: Path, notes: Progress | None = None, **changes: Any) -> Lowering:
    config = changes.pop("config", HEAD_DIM_80)
    is_named = changes.pop("is_named", True)
    in_slots = changes.pop("in_slots", False)
    return choose_lowering(
        way,  # type: ignore[arg-type]
        target_for(**changes),
        config=config,
        library=library,
        is_named=is_named,
        in_slots=in_slots,
        progress=notes or Progress(),
    )


@pytest.mark.parametrize(
    ("backend", "version", "opset", "body"),
    [
        ("tensorrt", "10.3.0.26", 18, "matmul"),  # JetPack 6
        ("tensorrt", "10.3.0.26", 23, "matmul"),
        ("tensorrt", "10.13.3.9", 23, "matmul"),  # JetPack 7
        ("tensorrt", "10.14.1.48", 23, "attention"),
        ("tensorrt", "10.14.1.48", 22, "matmul"),
        ("tensorrt", "11.0.0.114", 23, "attention"),
        ("tensorrt-rtx", "1.7.1.116", 23, "attention"),
        ("tensorrt-rtx", "1.7.1.116", 20, "matmul"),
    ],
)
def test_body_for_each_tensorrt(backend: str, version: str, opset: int, body: str) -> None:
    assert attention_body_for_tensorrt(target_for(version, backend=backend, opset=opset)) == body


@pytest.mark.parametrize("way", ["auto", "plugin"])
def test_plugins_where_they_can_be(way: str, library: Path) -> None:
    chosen = choose(way, library)
    assert chosen.body is None
    assert chosen.library is not None
    assert chosen.library[0] == library
    assert chosen.attention(fused=False) == EngineAttention(way="plugin")


def test_a_library_that_nobody_named_must_have_been_built_here(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with refused(UntrustedError, library, reason="unsafe"):
        choose("plugin", library, is_named=False)
    assert choose("auto", library, is_named=False).library is None
    assert record_built(PluginLibraryRecord.read(library).library.sha256, library) is None
    assert choose("plugin", library, is_named=False).library is not None


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            {"backend": "tensorrt-rtx", "version": "1.7.1.116"},
            ["TensorRT-RTX"],
        ),
        ({"precision": "fp32"}, ["fp16", "bf16", "fp32"]),
        ({"config": HEAD_DIM_48}, ["head_dim", "64, 80", 48]),
        (
            {"compute_capabilities": (ComputeCapability(7, 5),)},
            ["compute capability", "8.0", "7.5"],
        ),
        ({"version": "11.0.0.1"}, ["TensorRT", "10.3", "11.0.0.1"]),
    ],
)
def test_where_they_cannot_plugin_says_why_and_auto_goes_native(
    changes: dict[str, Any], facts: list[object], library: Path
) -> None:
    with refused(EngineError, *facts):
        choose("plugin", library, **changes)
    notes = Notes()
    chosen = choose("auto", library, notes, **changes)
    assert chosen.body in ("attention", "matmul")
    assert chosen.library is None
    # What can be mended is worth a note; a TensorRT or precision without plugins is as it is.
    assert bool(notes.notes) == ("backend" not in changes and "precision" not in changes)


def test_without_a_library_plugin_says_how_to_get_one_and_auto_goes_native() -> None:
    with refused(ManifestError, "none.so") as caught:
        choose("plugin", Path("none.so"))
    assert "mmvision build-plugins" in str(caught.value.hint)
    notes = Notes()
    assert choose("auto", Path("none.so"), notes).body == "matmul"
    assert "no such plugin library" in notes.notes[0]


def test_native_and_packed(library: Path) -> None:
    assert choose("native", library).body == "matmul"
    packed = choose("packed", library, version="11.1.0.10").attention(fused=False)
    assert packed == EngineAttention(way="packed")
    for way, changes, facts in (
        ("packed", {}, ("11.1", "10.3.0.30")),
        ("packed", {"version": "11.0.0.114"}, ("11.1", "11.0.0.114")),
        ("packed", {"version": "11.1.0.10", "precision": "fp32"}, ("fp16", "bf16", "fp32")),
        ("flash", {}, ("auto, plugin, packed, uniform, equal, native", "'flash'")),
    ):
        with pytest.raises(EngineError) as caught:
            choose(way, library, None, **changes)
        assert all(fact in str(caught.value) for fact in facts)


@pytest.mark.parametrize(
    ("body", "fused", "attention"),
    [
        ("attention", True, EngineAttention(way="native", body="attention", fused=True)),
        ("matmul", False, EngineAttention(way="native", body="matmul")),
        (
            "uniform_attention",
            True,
            EngineAttention(way="uniform", body="attention", fused=True),
        ),
        ("equal_matmul", False, EngineAttention(way="equal", body="matmul")),
    ],
)
def test_attention_of_a_record(body: Any, fused: bool, attention: EngineAttention) -> None:
    assert Lowering(body).attention(fused=fused) == attention
    assert attention.masked == (attention.way == "native")
    assert not EngineAttention(way="plugin").masked
    assert not EngineAttention(way="packed").masked


def test_auto_without_plugins_is_packed_where_it_can_be_and_native_if_that_fails() -> None:
    chosen = choose("auto", Path("none.so"), version="11.1.0.10")
    assert chosen.body == "packed"
    assert chosen.fallback == Lowering("attention")
    # Who asks for it gets it or an error.
    assert choose("packed", Path("none.so"), version="11.1.0.10").fallback is None


@pytest.mark.parametrize(
    ("changes", "fallback"),
    [
        ({}, Lowering("matmul")),
        ({"precision": "bf16"}, Lowering("matmul")),
        ({"version": "10.14.1.48"}, Lowering("attention")),
    ],
)
def test_auto_with_plugins_falls_back_and_plugin_does_not(
    changes: dict[str, Any], fallback: Lowering, library: Path
) -> None:
    chosen = choose("auto", library, **changes)
    assert chosen.fallback == fallback
    asked_for = choose("plugin", library, **changes)
    assert asked_for.fallback is None
    assert dataclasses.replace(chosen, fallback=None) == asked_for


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "11.0.0.114"},
        {"version": "11.1.0.10", "precision": "fp32"},
        {"backend": "tensorrt-rtx", "version": "1.7.1.116"},
    ],
)
def test_auto_is_native_where_packed_is_not_there(changes: dict[str, Any]) -> None:
    chosen = choose("auto", Path("none.so"), **changes)
    assert (chosen.body, chosen.fallback) == ("attention", None)


@pytest.mark.parametrize("way", sorted(SLOT_WAYS))
@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "matmul"),
        ({"version": "10.14.1.48"}, "attention"),
        ({"version": "10.14.1.48", "opset": 22}, "matmul"),
        ({"backend": "tensorrt-rtx", "version": "1.7.1.116"}, "attention"),
        ({"backend": "tensorrt-rtx", "version": "1.7.1.116", "precision": "fp32"}, "attention"),
    ],
)
def test_slots_in_the_form_that_the_parser_takes(
    way: str, changes: dict[str, Any], form: str, library: Path
) -> None:
    chosen = choose(way, library, **changes)
    assert (chosen.body, chosen.library, chosen.fallback) == (f"{way}_{form}", None, None)
    attention = chosen.attention(fused=False)
    assert (attention.way, attention.body) == (way, form)
    assert attention.rows_per_slot == SLOT_WAYS[attention.way]


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({"backend": "tensorrt-rtx", "version": "1.7.1.116"}, ["uniform", "native"]),
        ({"precision": "fp32"}, ["uniform", "native"]),
        ({"version": "11.1.0.10"}, ["packed", "uniform", "native"]),
        ({}, ["plugin", "uniform", "native"]),
    ],
)
def test_auto_with_slots_is_uniform_where_neither_plugins_nor_packed_are(
    changes: dict[str, Any], ways: list[str], library: Path
) -> None:
    chosen: Lowering | None = choose("auto", library, in_slots=True, **changes)
    found = []
    while chosen is not None:
        found.append(chosen.attention(fused=False).way)
        chosen = chosen.fallback
    assert found == ways


def operators(graph: Path, lowering: Lowering, parser: tuple[int, int] = (11, 1)) -> dict[str, int]:
    model = lowered_model(graph, lowering, parser)
    names = [node.op_type for node in model.graph]
    return {name: names.count(name) for name in names}


def test_lowering_swaps_the_body_without_a_second_export(exported: Path) -> None:
    matmul = operators(exported / "model.onnx", Lowering("matmul"))
    assert "Softmax" in matmul
    assert "Attention" not in matmul
    assert "Attention" in operators(exported / "model.onnx", Lowering("attention"))


def test_plugin_graph_keeps_the_nodes_and_drops_their_definitions(exported: Path) -> None:
    model = lowered_model(exported / "model.onnx", Lowering(None), (10, 3))
    layers = HEAD_DIM_80.num_hidden_layers
    custom = [node for node in model.graph if node.domain == "mmvision"]
    assert [n.op_type for n in custom].count("VarlenAttention") == layers
    assert [n.op_type for n in custom].count("QKRotaryEmbedding") == layers
    assert all(node.attributes["plugin_namespace"].as_string() == "mmvision" for node in custom)
    assert not model.functions
    # The file itself still carries them.
    assert ir.load(exported / "model.onnx").functions


@pytest.mark.parametrize("parser", [(10, 3), (11, 1)])
def test_slots_are_cut_once_for_all_layers(parser: tuple[int, int], exported: Path) -> None:
    """The mask and the sizes, from shapes and cu_seqlens alone."""
    for way in SLOT_WAYS:
        body: Any = f"{way}_matmul"
        model = lowered_model(exported / "model.onnx", Lowering(body), parser)
        names = [(node.name or "").rpartition(".")[2] for node in model.graph]
        layers = HEAD_DIM_80.num_hidden_layers
        assert names.count("slot_patches") == names.count("num_slots") == 1
        assert names.count("scores") == layers
        assert names.count("of_image") == (way == "uniform")


def test_packed_graph_has_tensorrts_op_and_no_mask(exported: Path) -> None:
    found = operators(exported / "model.onnx", Lowering("packed"))
    assert found["TRT_Attention"] == HEAD_DIM_80.num_hidden_layers
    assert (
        "Equal" not in found
        or found["Equal"] < operators(exported / "model.onnx", Lowering("matmul"))["Equal"]
    )
    model = lowered_model(exported / "model.onnx", Lowering("packed"), (11, 1))
    node = next(node for node in model.graph if node.op_type == "TRT_Attention")
    assert node.domain == "trt"
    assert node.inputs[3] is None
    assert node.inputs[4] is not node.inputs[5]
    copy = node.inputs[5]
    assert copy is not None
    producer = copy.producer()
    assert producer is not None
    assert producer.op_type == "Identity"
    assert producer.inputs[0] is node.inputs[4]


def test_tensorrt_rtx_parses_the_packed_graph(exported: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = ir.to_proto(lowered_model(exported / "model.onnx", Lowering("packed"), (11, 1)))
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString(), str(exported / "model.onnx")), parser.get_error(
        0
    ).desc()
    forms = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            forms.append((layer.attention.query_form, layer.attention.key_value_form))
    packed = trt.AttentionIOForm.PACKED_NHD
    assert forms == [(packed, packed)] * HEAD_DIM_80.num_hidden_layers


def test_request_is_not_changed_by_another_gpu(library: Path) -> None:
    """A later GPU than the library's binaries compiles its PTX."""
    assert (
        choose("plugin", library, compute_capabilities=(ComputeCapability(12, 0),)).library
        is not None
    )
