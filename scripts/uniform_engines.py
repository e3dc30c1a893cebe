"""Build engines whose attention is over slots, and print the table of docs/attention.md.

`python scripts/uniform_engines.py [CC ...]`, by default for 8.6, 8.9 and 12.0. No GPU is needed.

The encoder has the released width and two of its layers. Each engine is built as `build-engine` does
first, without permission to split attention into several kernels: what is built so is fused, and what
is refused is not. Where it is refused, it is built with that permission. The last engine for each
GPU is the control: float32, which has no fused kernel.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.artifacts.profile import profiles_from_slots
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.progress import Progress
from mmvision_export.engine.attention import Lowering, lowered_model
from mmvision_export.engine.builder import BuilderError, PlanRequest, plan_from_model
from mmvision_export.engine.choices import SLOT_WAYS, AttentionWay
from mmvision_export.engine.parser_support import parser_version
from mmvision_export.engine.target import resolve_target
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.weights import WeightSource
from mmvision_export.ops.varlen_attention.onnx_op import AttentionBody

if TYPE_CHECKING:
    import onnx_ir as ir

SLOTS = ((1, 1024), (8, 1024), (1, 13824), (16, 256))
CONFIG = EncoderConfig(num_hidden_layers=2, text_hidden_size=512, projector_hidden_size=512)

MaskForm = Literal["none", "[S, 1, 1, L]", "[S, 1, L, L]", "[1, 1, N, N]"]
Shapes = Literal["dynamic", "static"]


_BODIES: dict[AttentionWay, AttentionBody] = {
    "uniform": "uniform_attention",
    "equal": "equal_attention",
    "native": "attention",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        way: `uniform` or `equal`, and `native` beside them.
        mask: Form of the key mask.
        shapes: Whether the network's inputs are dynamic, with one profile of one size, or static.
        slots: S and L.
        precision: fp16; fp32 is the control, which has no fused kernel.
    """

    way: AttentionWay
    mask: MaskForm
    shapes: Shapes
    slots: tuple[int, int]
    precision: str = "fp16"


def cases() -> Iterator[Case]:
    """All of them."""
    forms: tuple[tuple[AttentionWay, MaskForm], ...] = (
        ("uniform", "[S, 1, 1, L]"),
        ("uniform", "[S, 1, L, L]"),
        ("equal", "none"),
        ("native", "[1, 1, N, N]"),
    )
    for slots in SLOTS:
        for way, mask in forms:
            yield Case(way, mask, "dynamic", slots)
            yield Case(way, mask, "static", slots)
    yield Case("uniform", "[S, 1, 1, L]", "dynamic", SLOTS[0], precision="fp32")


def expand_masks(model: ir.Model) -> None:
    """Give each attention's mask a query axis of full length, in a lowered graph."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    found = {(node.name or "").rpartition(".")[2]: node for node in model.graph}
    first = next(node for node in model.graph if node.op_type == "Attention")
    mask = first.inputs[3]
    slots, length = (found[name].outputs[0] for name in ("num_slots", "slot_patches"))
    one = ir.node("Constant", [], attributes={"value_ints": [1]}, name="one_head")
    sizes = [slots, one.outputs[0], length, length]
    shape = ir.node("Concat", sizes, attributes={"axis": 0}, name="expanded_shape")
    expanded = ir.node("Expand", [mask, shape.outputs[0]], name="expanded_mask")
    for node in (one, shape, expanded):
        node.outputs[0].name = node.name
    model.graph.insert_before(first, [one, shape, expanded])
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, expanded.outputs[0])
    ShapeInferencePass()(model)


def fix_shapes(model: ir.Model, patches: int, rows: int) -> None:
    """Make every shape of a graph a constant."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    pixel_values, grid_thw = model.graph.inputs
    assert pixel_values.shape is not None
    pixel_values.shape = ir.Shape([patches, pixel_values.shape[1]])
    grid_thw.shape = ir.Shape([rows, 3])
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    ShapeInferencePass()(model)


def request_for(case: Case, graph: Path, capability: ComputeCapability) -> PlanRequest:
    """What the builder gets."""
    import onnx_ir as ir

    directory = graph.parent
    target = resolve_target(
        directory,
        Manifest.read(directory),
        precision=case.precision,
        backend="tensorrt-rtx",
        compute_capabilities=[capability],
        device=None,
        progress=Progress(),
    )
    body = _BODIES[case.way]
    model = lowered_model(graph, Lowering(body), parser_version(target))
    profiles = profiles_from_slots([case.slots], SLOT_WAYS.get(case.way, 2), CONFIG)
    if case.mask == "[S, 1, L, L]":
        expand_masks(model)
    if case.shapes == "static":
        fix_shapes(model, profiles[0].max_patches, profiles[0].max_images)
    return PlanRequest(
        model=ir.serde.serialize_model(model).SerializeToString(),
        location=graph,
        target=target,
        profiles=profiles,
        patch_dim=CONFIG.patch_dim,
        timing_cache=None,
    )


class ActivationMemory(logging.Handler):
    """What the builder last said of it, among what Polygraphy passes on."""

    def __init__(self) -> None:
        super().__init__(level=logging.DEBUG)
        self.megabytes = "not said"

    def emit(self, record: logging.LogRecord) -> None:
        said = re.search(r"Total Activation Memory: (\d+) bytes", record.getMessage())
        if said is not None:
            self.megabytes = f"{int(said[1]) / 1e6:.1f} MB"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the builder made of a request.

    Attributes:
        plan: A plan, or the builder's own words.
        seconds: Of the build.
        activations: Memory that an execution of the engine takes, as the builder reports it.
    """

    plan: bytes | BuilderError
    seconds: float
    activations: str


def built(request: PlanRequest, *, decomposable: bool) -> Outcome:
    """Build, and listen to what the builder says."""
    from polygraphy.logger import G_LOGGER

    memory = ActivationMemory()
    logger = logging.getLogger("Polygraphy")
    level = logger.level
    logger.addHandler(memory)
    logger.setLevel(logging.DEBUG)
    start = time.perf_counter()
    try:
        with G_LOGGER.verbosity(G_LOGGER.VERBOSE):
            plan: bytes | BuilderError = plan_from_model(
                request, decomposable=decomposable, progress=Progress()
            ).content
    except BuilderError as error:
        plan = error
    finally:
        logger.removeHandler(memory)
        logger.setLevel(level)
    return Outcome(plan, time.perf_counter() - start, memory.megabytes)


def row_of(case: Case, capability: ComputeCapability, graph: Path) -> str:
    """A row of the table."""
    request = request_for(case, graph, capability)
    outcome = built(request, decomposable=False)
    kernel = "fused"
    if isinstance(outcome.plan, BuilderError):
        said = re.search(r"Attention operation was [^.]*\.", str(outcome.plan))
        kernel = said[0] if said is not None else str(outcome.plan).splitlines()[1].strip()
        outcome = built(request, decomposable=True)
    is_plan = isinstance(outcome.plan, bytes)
    size = f"{len(outcome.plan) / 1e6:.2f} MB" if isinstance(outcome.plan, bytes) else "not built"
    slots = "{} x {}".format(*case.slots)
    cells = (case.precision, case.way, case.mask, case.shapes, slots, str(capability), kernel)
    memory = outcome.activations if is_plan else "not built"
    return f"| {' | '.join(cells)} | {outcome.seconds:.1f} s | {size} | {memory} |"


def main(arguments: Sequence[str]) -> None:
    """Print the table, row by row."""
    capabilities = [ComputeCapability.parse(text) for text in arguments or ("8.6", "8.9", "12.0")]
    print(
        "| precision | way | mask | shapes | S x L | GPU | attention kernel | build | plan | activations |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp16", "fp32"):
            export_model_directory(
                WeightSource(random_config=CONFIG, seed=1),
                Path(folder) / precision,
                precision=precision,
            )
        for capability in capabilities:
            for case in cases():
                graph = Path(folder) / case.precision / GRAPH
                print(row_of(case, capability, graph), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
