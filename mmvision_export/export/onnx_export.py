"""The encoder as one ONNX graph, and the model directory around it."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset18

from mmvision_export.artifacts.manifest import (
    CPU_GRAPH,
    DATA,
    GRAPH,
    MANIFEST,
    UNIFORM_GRAPH,
    Manifest,
)
from mmvision_export.core.atomic import new_directory
from mmvision_export.core.errors import ExportError
from mmvision_export.core.files import file_record
from mmvision_export.core.progress import Progress
from mmvision_export.core.signals import signals_wait
from mmvision_export.core.verified_files import remember_verified
from mmvision_export.export.own_weights import optimize_with_own_weights
from mmvision_export.graph.files import save_cpu_graph, save_graph, save_uniform_graph
from mmvision_export.graph.passes import name_after_modules, name_dimensions
from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule
from mmvision_export.models.minimax_m3_vl.preprocess import PREPROCESSOR
from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
from mmvision_export.models.weight_statistics import weight_statistics
from mmvision_export.models.weights import DTYPES, WeightSource
from mmvision_export.ops.registry import attach_functions, translation_table
from mmvision_export.ops.varlen_attention.onnx_op import ATTENTION_OPSET
from mmvision_export.version import __version__

__all__ = ["OPSETS", "GraphCheck", "export_model_directory", "onnx_from_encoder"]

OPSETS = range(18, 24)
"""Opsets that can be asked for.

From 23 on, attention is ONNX's own operator; before, MatMul and Softmax.
"""

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors")


def onnx_from_encoder(encoder: VisionEncoderModule, *, opset: int = ATTENTION_OPSET) -> ir.Model:
    """Trace the encoder into ONNX, with any number of patches and of images.

    The graph has the encoder's own dtype. Its weights are the encoder's tensors, not copies.

    Args:
        encoder: In evaluation mode.
        opset: Version of the standard operators, one of `OPSETS`.

    Returns:
        A model with inputs `pixel_values` `[num_patches, patch_dim]` and `grid_thw` `[num_images,
        3]` int64, output `image_embeds` `[num_image_tokens, text_hidden_size]`, and the definitions
        of the custom ops.

    Raises:
        ExportError: The opset is not one of `OPSETS`.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset must be between {OPSETS[0]} and {OPSETS[-1]}, got {opset}")
    merge = encoder.config.spatial_merge_size
    # Two images of different size, so that nothing about the example can pass for a constant of the
    # model.
    grid_thw = torch.tensor([[1, 2 * merge, 2 * merge], [2, merge, 3 * merge]])
    num_patches = int(grid_thw.prod(dim=1).sum())
    input_dtype = torch.float32 if encoder.dtype == torch.bfloat16 else encoder.dtype
    pixel_values = torch.zeros(num_patches, encoder.config.patch_dim, dtype=input_dtype)
    dynamic = torch.export.Dim.DYNAMIC
    # An exception of a signal in the tracer's callbacks ends the process.
    with signals_wait(), _quiet_tracer():
        program = torch.onnx.export(
            encoder,
            (pixel_values, grid_thw),
            dynamo=True,
            opset_version=opset,
            input_names=["pixel_values", "grid_thw"],
            output_names=["image_embeds"],
            dynamic_shapes=({0: dynamic}, {0: dynamic}),
            custom_translation_table={
                **translation_table(),
                torch.ops.aten.floor_divide.default: _floor_divide,
            },
            verbose=False,
            optimize=False,
        )
        assert program is not None  # it is only when writing a file
        optimize_with_own_weights(program)
    model = program.model
    name_after_modules(model)
    name_dimensions(model)
    attach_functions(model)
    model.producer_name, model.producer_version = "mmvision-export", __version__
    return model


def _floor_divide(a: Any, b: Any) -> Any:
    # Patch positions are non-negative integers, for which ONNX's truncating Div is the floor; the
    # general translation adds seven nodes to correct the sign.
    return opset18.Div(a, b)


@contextlib.contextmanager
def _quiet_tracer() -> Iterator[None]:
    """Silence three messages of the tracer that say nothing about this model."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # torchvision is not installed
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning
        )
        warnings.filterwarnings(
            "ignore", message=r".*`LeafSpec` is deprecated", category=FutureWarning
        )
        try:
            yield
        finally:
            registration.setLevel(level)


class GraphCheck(Protocol):
    """What compares a graph that was just written."""

    @property
    def obstacle(self) -> str | None:
        """Why it cannot, or None."""

    def __call__(self, graph: Path, progress: Progress) -> None:
        """Compare the graph; raises if it is another function."""


def export_model_directory(
    source: WeightSource,
    output: Path,
    *,
    precision: str = "fp32",
    opset: int = ATTENTION_OPSET,
    resize: ResizeRule | None = None,
    max_long_side: int | None = None,
    force: bool = False,
    check: Callable[[VisionEncoderModule, str], GraphCheck] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export an encoder into a new model directory.

    Args:
        source: Where the weights come from.
        output: The directory to make.
        precision: fp32, fp16 or bf16.
        opset: One of `OPSETS`.
        resize: Rule by which images get their size; None for the checkpoint's.
        max_long_side: Of the rule `long-side`, in pixels.
        force: Replace an existing directory.
        check: Given the encoder and the precision, makes what is called with the first graph that a
            CPU runs, as `parity.quick.QuickCheck`. What it raises leaves no directory.
        progress: Told about each step.

    Raises:
        ConfigError, CheckpointError: The weights cannot be loaded, or the rule has no such bound.
        ExportError: The graph cannot be made, or fails its check.
        OutputError: The directory exists, or cannot be written.
    """
    progress = progress or Progress()
    if opset not in OPSETS:
        raise ExportError(f"opset must be between {OPSETS[0]} and {OPSETS[-1]}, got {opset}")
    # The directory first: what cannot be written is an error now, and not after the work.
    with new_directory(output, marker=MANIFEST, force=force) as directory:
        loaded = source.load(DTYPES[precision], progress)
        statistics = weight_statistics(loaded.encoder)
        config = loaded.encoder.config
        preprocessor = loaded.family.preprocessor(
            config, loaded.preprocessor, resize=resize, max_long_side=max_long_side
        )
        checked = None if check is None else check(loaded.encoder, precision)
        progress.step("tracing the encoder")
        model = onnx_from_encoder(loaded.encoder, opset=opset)
        save_graph(model, directory, GRAPH, progress)
        names = [GRAPH, DATA, PREPROCESSOR]
        if precision == "fp32":
            progress.step(f"writing {CPU_GRAPH} and {UNIFORM_GRAPH}")
            save_cpu_graph(directory, config)
            save_uniform_graph(directory)
            names += [CPU_GRAPH, UNIFORM_GRAPH]
        source_facts = loaded.source
        del loaded, model  # the check opens the graph, which has the weights once more
        if checked is not None and (obstacle := checked.obstacle) is not None:
            progress.note(f"the graph is not checked: {obstacle}")
        elif checked is not None:
            checked(directory / (CPU_GRAPH if CPU_GRAPH in names else GRAPH), progress)
        content = json.dumps(preprocessor.to_dict(), indent=2) + "\n"
        (directory / PREPROCESSOR).write_text(content, encoding="utf-8")
        progress.step("hashing")
        manifest = Manifest(
            config=config,
            precision=precision,
            opset=opset,
            source=source_facts,
            weights=statistics,
            versions=_versions(),
            files={name: file_record(directory / name) for name in names},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        manifest.write(directory)
    # Just hashed as they were written: opening the directory need not read the weights again.
    remember_verified(output / DATA, manifest.files[DATA].sha256)
    return manifest


def _versions() -> dict[str, str]:
    return {"mmvision-export": __version__} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
