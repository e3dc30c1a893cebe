"""INT8 for a CPU, in two graphs of one function on one weight file."""

from __future__ import annotations

from collections.abc import Container

from mmvision_export.core.processor import cpu_has_vnni

__all__ = ["CPU_INT8_GRAPH", "VNNI_GRAPH", "data_of", "original_of", "variant_for_this_cpu"]

CPU_INT8_GRAPH = "model.cpu-int8.onnx"
"""The CPU's graph with integer products, whose unsigned weights every CPU multiplies exactly."""
VNNI_GRAPH = "model.cpu-int8-vnni.onnx"
"""The same function, its weights made signed while it is loaded: exact and faster on x86 processors with
VNNI, wrong on those without."""


def original_of(graph: str) -> str:
    """The graph whose weights a graph has, and whose record describes it: itself, unless it is a variant."""
    return CPU_INT8_GRAPH if graph == VNNI_GRAPH else graph


def data_of(graph: str) -> str:
    """File name of the weights that a graph does not share with the portable one, if it has any."""
    return f"{original_of(graph)}.data"


def variant_for_this_cpu(graph: str, files: Container[str]) -> str:
    """The variant of a graph that this processor runs fastest.

    Args:
        graph: Its file name.
        files: Names of those that there are.
    """
    return (
        VNNI_GRAPH if graph == CPU_INT8_GRAPH and VNNI_GRAPH in files and cpu_has_vnni() else graph
    )
