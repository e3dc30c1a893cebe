"""The graphs of a model directory as parity looks at them.

Each verified, loaded and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.graph.load import load_graph
from mmvision_export.parity.rounded import rounded_model
from mmvision_export.parity.stages import GraphFacts, facts_of_graph

__all__ = ["LoadedGraph", "graph_from_file", "graphs_from_directory"]


@dataclasses.dataclass(frozen=True)
class LoadedGraph:
    """One graph; its weights stay in their file.

    Attributes:
        path: Its file.
        facts: What decides how it is judged.
        rounded: The graph, each value of its float type rounded to it; see `rounded_model`.
    """

    path: Path
    facts: GraphFacts
    rounded: ir.Model


def graph_from_file(path: Path) -> LoadedGraph:
    """Load a graph.

    Raises:
        ParityError: See `rounded_model`.
    """
    model = load_graph(path)
    facts = facts_of_graph(model)
    return LoadedGraph(path, facts, rounded_model(model, facts.float_type))


def graphs_from_directory(
    directory: Path, manifest: Manifest, names: Sequence[str]
) -> dict[str, LoadedGraph]:
    """File name -> graph. Files are hashed, one that several graphs share once.

    Raises:
        ManifestError: A graph or a file of its weights is missing, or not the one that the manifest
            describes.
        ParityError: See `rounded_model`.
    """
    manifest.verify(directory, names)
    graphs = {name: graph_from_file(directory / name) for name in names}
    manifest.verify(
        directory, {file: None for graph in graphs.values() for file in graph.facts.data_files}
    )
    return graphs
