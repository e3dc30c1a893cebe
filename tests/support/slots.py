"""Profiles and graphs for images in slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.manifest import OPENVINO_GRAPH, UNIFORM_GRAPH, Manifest
from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.files import file_record
from mmvision_export.graph.passes import inline_functions
from tests.support.configs import copy_of


def slot_profiles(pairs: Sequence[tuple[int, int]], rows_per_slot: int = 2) -> list[Profile]:
    """A bucket of S slots of L patches for each (S, L), in the order given."""
    return [
        Profile(
            min_patches=slots * length,
            opt_patches=slots * length,
            max_patches=slots * length,
            min_images=rows_per_slot * slots,
            max_images=rows_per_slot * slots,
            slots=slots,
        )
        for slots, length in pairs
    ]


def with_openvino_graph(directory: Path, target: Path, name: str) -> Path:
    """A copy of a model directory whose only graph for OpenVINO has a name of choice.

    The graph is the portable one with its functions inlined, which takes packed batches. Images in
    slots, each with its padding, are such a batch.
    """
    copy = copy_of(directory, target)
    manifest = Manifest.read(copy)
    for graph in (UNIFORM_GRAPH, OPENVINO_GRAPH):
        manifest.files.pop(graph, None)
        (copy / graph).unlink(missing_ok=True)
    model = ir.load(copy / "model.onnx")
    inline_functions(model)
    content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (copy / name).write_bytes(content)
    manifest.files[name] = file_record(copy / name)
    manifest.write(copy)
    return copy
