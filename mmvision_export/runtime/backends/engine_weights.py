"""Weights that an engine gets when it is opened, and how much device memory they may have.

A stripped plan has none, and a plan that was built to be refitted may get those of another checkpoint.
TensorRT's own parser puts them in: it reads the graph that the plan was built from, and the weights by
the names that the graph gives them. On the machines this project is developed on no engine can be
deserialised, so that these calls have run against a stand-in only.

References:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/refitting-engines.html
    ModelRefitter.cpp of onnx-tensorrt: it looks for weights in the graph itself and not in the
    definitions of its functions, so that the graph must have none; and it fails unless it finds all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmvision_export.artifacts.engine_record import EngineRecord
from mmvision_export.artifacts.external_data import external_locations
from mmvision_export.artifacts.manifest import DATA, Manifest
from mmvision_export.core.errors import BackendError, ManifestError
from mmvision_export.core.progress import Progress
from mmvision_export.core.verified_files import verify_file
from mmvision_export.runtime.backends.backend import BackendOptions, WeightBudget

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["budget_weights", "put_weights"]

Checked = Callable[[Any, str], Any]
"""Turns TensorRT's None or False into an error that says what it could not do."""


def put_weights(
    engine: trt.ICudaEngine,
    path: Path,
    record: EngineRecord,
    manifest: Manifest,
    options: BackendOptions,
    *,
    module: Any,
    logger: Any,
    checked: Checked,
) -> None:
    """Put a model directory's weights into an engine, verified first.

    Args:
        engine: Deserialised, without execution contexts.
        path: Its file, in the model directory's `plans/`.
        record: Its sidecar, with the graph by which the weights are put in.
        manifest: The model directory's.
        options: When weights are hashed, and what is told about it.
        module: The TensorRT module.
        logger: TensorRT's logger.
        checked: See `Checked`.

    Raises:
        ManifestError: The graph or the weights are missing, damaged, or not files of the directory.
        BackendError: TensorRT does not take them, or lacks some.
    """
    assert record.refit_graph is not None
    graph = record.refit_graph.content(path)
    directory = path.resolve().parent.parent
    progress = options.progress or Progress()
    allowed = {DATA, f"{record.graph.name}.data"}
    for location in sorted(external_locations(graph)):
        if location not in allowed:
            raise ManifestError(
                f"{record.refit_graph.name} reads its weights from {location!r}, which is not the "
                f"weight file of {record.graph.name}",
                hint="build the engine again here with: mmvision build-engine",
                reason="unsafe",
            )
        verify_file(
            manifest.record_of(location),
            manifest.path_of(directory, location),
            said_by="the manifest",
            when=options.verify,
            progress=progress,
        )
    progress.step("putting the weights into the engine")
    refitter: trt.Refitter = checked(module.Refitter(engine, logger), f"refit {path}")
    parser: trt.OnnxParserRefitter = checked(
        module.OnnxParserRefitter(refitter, logger), f"refit {path}"
    )
    # The path is where the weights are looked for: beside it.
    if not parser.refit_from_bytes(graph, str(directory / record.graph.name)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        checked(False, f"take the weights for {path} ({'; '.join(errors) or 'no parser error'})")
    if missing := refitter.get_missing_weights():
        raise BackendError(
            f"{path} wants {len(missing)} weights that {record.graph.name} has not: "
            f"{', '.join(missing[:3])}",
            hint="build the engine again, with its weights: leave out --strip-weights and --refit",
        )
    checked(refitter.refit_cuda_engine(), f"put the weights into {path}")


def budget_weights(
    engine: trt.ICudaEngine, path: Path, budget: WeightBudget | None
) -> tuple[int, int] | None:
    """Limit the device memory of an engine's weights, before it has any execution context.

    Args:
        engine: Deserialised.
        path: Its file, for an error.
        budget: Bytes, `auto` for what TensorRT proposes by the memory that is free now, or None for
            all weights on the device.

    Returns:
        The bytes of weights that may be streamed, and those of them that stay on the device. None
        where no budget was given.

    Raises:
        ManifestError: The engine was not built to stream its weights.
        BackendError: TensorRT did not take the budget.
    """
    if budget is None:
        return None
    streamable = int(engine.streamable_weights_size)
    if streamable <= 0:
        raise ManifestError(
            f"{path} cannot stream its weights: it was built without --weight-streaming",
            hint="build one with: mmvision build-engine --weight-streaming",
        )
    wanted = engine.get_weight_streaming_automatic_budget() if budget == "auto" else budget
    wanted = min(int(wanted), streamable)
    try:
        engine.weight_streaming_budget_v2 = wanted
    except RuntimeError as error:
        raise BackendError(
            f"TensorRT did not take a weight budget of {wanted} bytes: {error}"
        ) from error
    taken = int(engine.weight_streaming_budget_v2)
    if taken != wanted:
        raise BackendError(f"TensorRT took a weight budget of {taken} bytes, not of {wanted}")
    return streamable, taken
