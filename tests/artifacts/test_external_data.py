"""The weight files that a graph names, against onnx's own reading of the graph."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import onnx
import pytest
from google.protobuf.message import DecodeError

from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import file_record
from mmvision_export.graph.load import load_graph
from mmvision_export.runtime.vision_encoder import VisionEncoder
from tests.reliability.fuzz import locations_by_onnx
from tests.support.errors import refused


def external_tensor(location: str, name: str = "w") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def everywhere(location: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """A model for each place of onnx.proto where a tensor can stand."""
    tensor = external_tensor(location)

    def model(**content: Any) -> onnx.ModelProto:
        return onnx.ModelProto(ir_version=10, **content)

    def node(**attribute: Any) -> onnx.NodeProto:
        made = onnx.NodeProto(op_type="Constant")
        made.attribute.add(name="value", **attribute)
        return made

    sparse = onnx.SparseTensorProto(values=tensor)
    graph = onnx.GraphProto(initializer=[tensor])
    yield "initializer", model(graph=graph)
    yield "sparse values", model(graph=onnx.GraphProto(sparse_initializer=[sparse]))
    yield (
        "sparse indices",
        model(graph=onnx.GraphProto(sparse_initializer=[onnx.SparseTensorProto(indices=tensor)])),
    )
    yield "attribute", model(graph=onnx.GraphProto(node=[node(t=tensor)]))
    yield "attributes", model(graph=onnx.GraphProto(node=[node(tensors=[tensor])]))
    yield "nested", model(graph=onnx.GraphProto(node=[node(g=graph)]))
    yield "nested graphs", model(graph=onnx.GraphProto(node=[node(graphs=[graph])]))
    yield "sparse attribute", model(graph=onnx.GraphProto(node=[node(sparse_tensor=sparse)]))
    yield "sparse attributes", model(graph=onnx.GraphProto(node=[node(sparse_tensors=[sparse])]))
    yield "function", model(functions=[onnx.FunctionProto(node=[node(t=tensor)])])
    default = onnx.AttributeProto(name="d", t=tensor)
    yield "function default", model(functions=[onnx.FunctionProto(attribute_proto=[default])])
    yield "training", model(training_info=[onnx.TrainingInfoProto(algorithm=graph)])
    yield "initialization", model(training_info=[onnx.TrainingInfoProto(initialization=graph)])


@pytest.mark.parametrize("place", [place for place, _ in everywhere("x")])
def test_every_place_of_a_tensor_is_searched(place: str) -> None:
    model = dict(everywhere("../secret"))[place]
    assert external_locations(model.SerializeToString()) == {"../secret"}


def test_fields_that_hold_messages_with_tensors_are_all_walked() -> None:
    """onnx's own description of the messages: a field that is added there is missed here."""
    from mmvision_export.artifacts.external_data import _CHILDREN

    names = {
        f"{kind}Proto": fields for kind, fields in _CHILDREN.items() if kind != "TrainingInfo"
    } | {"TrainingInfoProto": _CHILDREN["TrainingInfo"]}
    for kind, fields in names.items():
        described = {
            field.number: field.message_type.name.removesuffix("Proto")
            for field in getattr(onnx, kind).DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in names
        }
        walked = dict(fields)
        if kind == "TensorProto":
            assert walked.pop(13) == "ExternalDataEntry"
            assert onnx.TensorProto.DESCRIPTOR.fields_by_number[13].name == "external_data"
        assert walked == described, kind


def test_every_value_of_an_ambiguous_entry_counts() -> None:
    first = onnx.StringStringEntryProto(key="location", value="model.onnx.data")
    second = onnx.StringStringEntryProto(key="offset", value="/etc/shadow")
    entry = first.SerializeToString() + second.SerializeToString()
    tensor = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    model = b"\x3a" + bytes([len(graph)]) + graph
    assert external_locations(model) == {"model.onnx.data", "/etc/shadow"}


def test_depth_is_no_limit() -> None:
    content = onnx.GraphProto(initializer=[external_tensor("deep")]).SerializeToString()
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # Attribute.g, Node.attribute, Graph.node
            content = tag + varint(len(content)) + content
    assert external_locations(b"\x3a" + varint(len(content)) + content) == {"deep"}


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_the_exported_graphs(exported: Path) -> None:
    for graph in exported.glob("*.onnx"):
        assert external_locations(graph.read_bytes()) == {"model.onnx.data"}


@hypothesis.given(
    place=st.sampled_from([place for place, _ in everywhere("x")]),
    at=st.integers(0, 200),
    inserted=st.binary(max_size=3),
    removed=st.integers(0, 3),
)
def test_what_onnx_would_open_is_found_or_refused(
    place: str, at: int, inserted: bytes, removed: int
) -> None:
    content = dict(everywhere("../secret"))[place].SerializeToString()
    content = content[:at] + inserted + content[at + removed :]
    try:
        opened = locations_by_onnx(onnx.load_model_from_string(content))
    except (DecodeError, UnicodeDecodeError):
        opened = set()
    try:
        found = external_locations(content)
    except ManifestError as error:
        assert error.reason in ("malformed", "unsafe")
    else:
        assert opened <= found


@hypothesis.given(st.lists(st.sampled_from([place for place, _ in everywhere("x")]), max_size=4))
def test_merged_models_name_all_their_files(places: list[str]) -> None:
    models = [
        dict(everywhere(f"{index}"))[place].SerializeToString()
        for index, place in enumerate(places)
    ]
    assert external_locations(b"".join(models)) == {str(index) for index in range(len(places))}


@pytest.mark.parametrize(
    "location",
    ["../elsewhere", "/etc/passwd", "unlisted.data", "manifest.json", "*/_ORT_MEM_ADDR_/*", ""],
)
def test_a_graph_that_reads_another_file_is_refused(
    exported: Path, tmp_path: Path, location: str
) -> None:
    directory = shutil.copytree(exported, tmp_path / "model")
    graph = directory / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.initializer.append(external_tensor(location, "more"))
    graph.write_bytes(model.SerializeToString())
    vouched_for(directory, "model.onnx")
    with refused(ManifestError, graph, repr(location), reason="unsafe"):
        VisionEncoder.open(directory)


def vouched_for(directory: Path, name: str) -> None:
    manifest = Manifest.read(directory)
    manifest.files[name] = file_record(directory / name)
    manifest.write(directory)


def test_weights_that_are_no_file_are_refused(exported: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(exported, tmp_path / "model")
    data = directory / "model.onnx.data"
    data.unlink()
    os.mkfifo(data)
    with refused(ManifestError, data, reason="unsafe"):
        VisionEncoder.open(directory)
    data.unlink()
    data.symlink_to(exported / "model.onnx.data")
    with refused(ManifestError, data, reason="unsafe"):
        VisionEncoder.open(directory)


def test_weights_with_several_names_are_refused_where_onnx_would(
    exported: Path, tmp_path: Path
) -> None:
    """As `cp -al` copies a directory. A runtime reads it; what loads it with onnx says what to do."""
    directory = shutil.copytree(exported, tmp_path / "model")
    assert load_graph(directory / "model.onnx").graph.name
    os.link(directory / "model.onnx.data", tmp_path / "other name")
    with VisionEncoder.open(directory):
        pass
    with refused(ManifestError, directory / "model.onnx.data", 2, reason="unsafe") as caught:
        load_graph(directory / "model.onnx")
    assert caught.value.hint is not None
    subprocess.run(caught.value.hint.partition(": ")[2], shell=True, check=True)
    assert load_graph(directory / "model.onnx").graph.name
