"""What a model directory, a graph or an engine is, as plain JSON values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.manifest import PLANS, Manifest
from mmvision_export.core.errors import ManifestError
from mmvision_export.core.files import sha256_of
from mmvision_export.core.records import json_from_record
from mmvision_export.core.trust import is_built_here
from mmvision_export.graph.load import load_graph

__all__ = ["inspect", "inspect_layers"]

_SHOWN = {"name": "Name", "kind": "LayerType", "tactic": "TacticName", "from": "Metadata"}
_CODE = (".engine", ".so", ".rtxcache")


def inspect(path: Path) -> dict[str, Any]:
    """Describe a model directory, an `.onnx` graph, or an `.engine` by its sidecar.

    An engine itself is not opened: that would run code from it, and needs the GPU it was built for.

    Raises:
        ManifestError: There is nothing there, or it is none of these, or does not match its
            manifest or sidecar.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".engine":
        return _engine(path)
    if path.suffix == ".onnx" and path.is_file():
        return _graph(path)
    raise ManifestError(f"{path}: no model directory, .onnx graph or .engine there")


def inspect_layers(path: Path) -> dict[str, Any]:
    """The layers of an engine, counted and listed, from the report beside it.

    Raises:
        ManifestError: It is no engine, has no report, or the report is not the one of its sidecar.
    """
    if path.suffix != ".engine":
        raise ManifestError(
            f"{path} is no .engine", hint="name an engine, as DIR/plans/NAME.engine, for its layers"
        )
    record = EngineRecord.read(path)
    record.verify(path)
    if record.layers is None:
        raise ManifestError(
            f"{path} has no report of its layers", hint="build it again with: mmvision build-engine"
        )
    layers = record.layers.read(path)
    return {
        "kind": "layers",
        **json_from_record(record.layers),
        "file": path.name,
        "report": record.layers.file.name,
        "layers": [{name: layer.get(key, "") for name, key in _SHOWN.items()} for layer in layers],
    }


def _directory(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    manifest.verify(path, manifest.files)
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    return {
        "kind": "model directory",
        **json_from_record(manifest),
        "parity": {
            name: manifest.parity.get(name, "not checked")
            for name in [*graphs, *(n for n in manifest.parity if n not in graphs)]
        },
        "graphs": {name: _graph(path / name) for name in graphs},
        "executable_content": _executable_content(path),
        "engines": [_engine_or_problem(file) for file in sorted((path / PLANS).glob("*.engine"))],
    }


def _executable_content(path: Path) -> dict[str, str]:
    """Files that are code, which opening the directory loads only where this user built them."""
    found = (file for suffix in _CODE for file in path.rglob(f"*{suffix}") if file.is_file())
    return {
        str(file.relative_to(path)): "built here"
        if is_built_here(sha256_of(file))
        else "not built here"
        for file in sorted(found)
    }


def _engine_or_problem(path: Path) -> dict[str, Any]:
    """An engine of a directory; what cannot be opened, as one whose build was killed, is no error."""
    try:
        return _engine(path)
    except ManifestError as error:
        return {"kind": "engine", "file": path.name, "problem": error.message}


def _engine(path: Path) -> dict[str, Any]:
    record = EngineRecord.read(path)
    record.verify(path)
    if record.refit_graph is not None:
        record.refit_graph.content(path)
    if record.layers is not None:
        record.layers.read(path)
    return {
        "kind": "engine",
        "file": path.name,
        "built_here": is_built_here(record.engine.sha256),
        **json_from_record(record),
    }


def _graph(path: Path) -> dict[str, Any]:

    try:
        model = load_graph(path)
    except Exception as error:  # the protobuf parser's exception has no public type
        raise ManifestError(f"{path}: not a readable ONNX file: {error}") from error
    graph = model.graph
    if not graph.outputs:
        raise ManifestError(f"{path}: not an ONNX model: it has no outputs")
    weights = [
        value.const_value for value in graph.initializers.values() if value.const_value is not None
    ]
    return {
        "kind": "graph",
        "file": path.name,
        "producer": f"{model.producer_name} {model.producer_version}",
        "opsets": dict(model.opset_imports),
        "inputs": {str(value.name): _type(value) for value in graph.inputs},
        "outputs": {str(value.name): _type(value) for value in graph.outputs},
        "operators": dict(
            Counter(_operator(node.domain, node.op_type) for node in graph).most_common()
        ),
        "functions": {
            _operator(domain, name): dict(Counter(node.op_type for node in function).most_common())
            for (domain, name, _), function in model.functions.items()
        },
        "parameters": sum(tensor.size for tensor in weights if tensor.dtype.is_floating_point()),
        "weight_bytes": sum(tensor.nbytes for tensor in weights),
        "weight_types": dict(
            Counter(tensor.dtype.name.lower() for tensor in weights).most_common()
        ),
    }


def _type(value: Any) -> str:
    if value.dtype is None:
        return str(value.type)
    shape = "" if value.shape is None else f"[{', '.join(str(d) for d in value.shape)}]"
    return f"{value.dtype.name.lower()}{shape}"


def _operator(domain: str, op_type: str) -> str:
    return f"{domain}::{op_type}" if domain else op_type
