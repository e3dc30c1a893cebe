"""The layers of a plan that was just built: from TensorRT's engine inspector, or from its builder.

The inspector reads a deserialised engine. TensorRT has its GPU at hand when it builds. TensorRT-RTX
deserialises nothing without a driver, and builds without one; its builder lists the same layers, in
words, when it is done. They are written down in the inspector's JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmvision_export.artifacts.layer_counts import layers_of
from mmvision_export.core.errors import EngineError, ManifestError

if TYPE_CHECKING:
    import tensorrt

__all__ = ["LISTING", "layers_from_listing", "report_from_inspector", "report_from_listing"]

LISTING = "Layers:\n"
"""How the message of TensorRT-RTX's builder begins that lists the layers."""

_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>[^,]+), Inputs: \[(?P<Inputs>.*)\], "
    r"Constants: \[(?P<Constants>.*)\], Outputs: \[(?P<Outputs>.*)\], "
    r"TacticName: (?P<TacticName>.*), StreamId: (?P<StreamId>-?\d+)"
    # What a stream waits for, and what it signals.
    r"(?P<Events>(?:, Event\w*: [^,]*)*)(?:, Metadata:(?P<Metadata>.*))?"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[^\]]*)\], .*?"
    r"Datatype: (?P<Datatype>\w+), Format: (?P<Format>.*?) \}"
)
_TENSORS = ("Inputs", "Constants", "Outputs")


def layers_from_listing(listing: str) -> list[dict[str, Any]]:
    """The layers that a builder listed in words.

    Args:
        listing: The message: `LISTING`, a line for each layer, and an empty line before anything else.

    Raises:
        EngineError: A line is of another form: the words are no interface, and may change with any
            release.
    """
    lines = listing.removeprefix(LISTING).partition("\n\n")[0].splitlines()
    layers: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        found = _LAYER.fullmatch(line.strip())
        if found is None:
            raise EngineError(f"line {number} of the builder's layers is of an unknown form")
        layer: dict[str, Any] = found.groupdict()
        for kind in _TENSORS:
            layer[kind] = _tensors(layer[kind], number)
        events = dict(each.split(": ") for each in layer.pop("Events").split(", ")[1:])
        metadata = (layer["Metadata"] or "").strip()
        layers.append({**layer, **events, "StreamId": int(layer["StreamId"]), "Metadata": metadata})
    if not layers:
        raise EngineError("the builder listed no layers")
    return layers


def _tensors(text: str, line: int) -> list[dict[str, Any]]:
    tensors = [match.groupdict() for match in _TENSOR.finditer(text)]
    if len(tensors) != text.count("{ Name: "):
        raise EngineError(f"a tensor in line {line} of the builder's layers is of an unknown form")
    return [
        {**tensor, "Dimensions": [int(each) for each in tensor["Dimensions"].split(",") if each]}
        for tensor in tensors
    ]


def report_from_listing(listings: Sequence[str]) -> bytes:
    """The layers that a builder listed, in the JSON of the engine inspector.

    Args:
        listings: Messages that begin with `LISTING`.

    Raises:
        EngineError: There is not exactly one, or it is of an unknown form.
    """
    if len(listings) != 1:
        raise EngineError(f"the builder listed the layers {len(listings)} times")
    return (json.dumps({"Layers": layers_from_listing(listings[0])}, indent=1) + "\n").encode()


def report_from_inspector(trt: Any, logger: Any, plan: bytes) -> bytes:
    """What the engine inspector says of a plan, as it says it.

    Args:
        trt: The TensorRT module.
        logger: A logger of it.
        plan: The plan, of this process: it is deserialised, which runs code from it.

    Returns:
        JSON that `layers_of` reads.

    Raises:
        EngineError: The plan was not deserialised, or the report is no such JSON.
    """
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    # A version-compatible plan brings a runtime of its own.
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError("TensorRT could not deserialise the engine that it has built")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise EngineError("TensorRT gave no engine inspector")
    text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    try:
        layers_of(json.loads(text))
    except (ValueError, ManifestError) as error:
        raise EngineError(f"the engine inspector's report is not readable: {error}") from error
    return text.encode()
