"""Writing a graph node by node, with names that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

__all__ = ["NamingTape"]


class NamingTape:
    """Records nodes in order, each named as its output. A profiler's table shows that name.

    ONNX IR's `Tape` leaves names to the caller. A tape's prefix (`blocks.0.`) stands before all of
    its names.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was recorded."""
        return self._tape.nodes

    def op(
        self, name: str, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node of one output, and give that output."""
        output = ir.Value(name=self._prefix + name)
        return self._tape.op(
            op_type, inputs, attributes, domain=domain, name=output.name, output=output
        )

    def constant(self, name: str, *integers: int) -> ir.Value:
        """Add an int64 constant `[len(integers)]`."""
        return self.op(name, "Constant", value_ints=integers)

    def scan(
        self, body: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[str]
    ) -> Sequence[ir.Value]:
        """Add a `Scan` over the first axis of all inputs, which carries no state.

        Args:
            body: From one slice of each input to one slice of each output.
            inputs: `[steps, ...]` each.
            outputs: Their names.

        Returns:
            `[steps, ...]` each.
        """
        values = [ir.Value(name=self._prefix + name) for name in outputs]
        attributes: dict[str, Any] = {"num_scan_inputs": len(inputs), "body": body}
        return self._tape.op_multi_out(
            "Scan", inputs, attributes, name=values[0].name, outputs=values
        )
