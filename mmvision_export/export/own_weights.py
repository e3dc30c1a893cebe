"""One initializer for each parameter, whatever values it has.

The optimiser of torch.onnx merges small initializers of equal values, and then the nodes that have
become equal. A freshly initialised checkpoint, whose layer norms are all ones, loses most of their
names that way. Every other graph of a model directory finds its weights by these names.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

__all__ = ["optimize_with_own_weights"]


def optimize_with_own_weights(program: torch.onnx.ONNXProgram) -> None:
    """Optimise a traced program as torch.onnx does, but merge no parameters.

    Args:
        program: Exported with `optimize=False`. Its model is changed in place.
    """
    graph = program.model.graph
    inputs = list(graph.inputs)
    # The optimiser merges and folds no input of the graph, since a caller may replace its value.
    # The tracer numbers the constants it makes; a parameter has its module's path for a name.
    graph.inputs.extend(value for name, value in graph.initializers.items() if "." in name)
    with _no_message_for_each_input():
        program.optimize()
    program.model.graph.inputs[:] = inputs


@contextlib.contextmanager
def _no_message_for_each_input() -> Iterator[None]:
    deduplication = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
    level = deduplication.level
    deduplication.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deduplication.setLevel(level)
