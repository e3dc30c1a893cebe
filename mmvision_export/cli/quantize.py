"""The `mmvision quantize` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmvision_export.artifacts.manifest import GRAPH, Manifest, flavour_graph
from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.options import AsJson, ModelOption, Quiet, Verbose, print_json, the_model
from mmvision_export.core.errors import QuantizationError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.quantize.choices import FLAVOURS, CalibrationMethod
from mmvision_export.runtime.given_images import files_of

if TYPE_CHECKING:
    from mmvision_export.quantize.photographs import Split
    from mmvision_export.quantize.quantize import QuantizationReport
    from mmvision_export.quantize.statistics import Batch

__all__ = ["quantize"]

_NAMED = 4
_LITTLE = 0.5  # of the operations: fewer in 8 bit are hardly worth it


@examples(
    "mmvision quantize --int8 --calibration photos/",
    "mmvision quantize --cpu-int8 --model engines/MiniMax-M3",
    "mmvision quantize --fp8 --image a.jpg b.jpg c.jpg --min-cosine 0.998",
)
def quantize(
    int8: Annotated[
        bool, typer.Option("--int8", help="INT8 for TensorRT (Q/DQ, float16 between).")
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="FP8 (E4M3) for TensorRT, compute capability 8.9 on.")
    ] = False,
    cpu_int8: Annotated[
        bool,
        typer.Option(
            "--cpu-int8", help="INT8 for ONNX Runtime's CPU provider, without calibrated ranges."
        ),
    ] = False,
    model: ModelOption = None,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="PATH",
            help="Images to calibrate on: files, folders or quoted patterns. Takes several values.",
        ),
    ] = None,
    calibration: Annotated[
        Optional[Path], typer.Option(metavar="FOLDER", help="Folder of images to calibrate on.")
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod,
        typer.Option(
            help="How the largest values are clipped; minmax clips none that it has seen."
        ),
    ] = "minmax",
    min_cosine: Annotated[
        float,
        typer.Option(
            metavar="COSINE",
            help="Gate: smallest cosine of a held-out token with the float32 graph's.",
        ),
    ] = PRECISIONS["int8"].gate.min_cosine,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a flavour that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which images would serve for what, and stop.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a quantised flavour of a float32 model directory.

    The units that cost the most accuracy stay in higher precision, as few as possible:
    every token of every image must pass the gate with a margin. The command holds out at least a
    quarter of the images. Without images, it calibrates on seeded random ones, which are good for a
    trial only.
    """
    from mmvision_export.quantize.quantize import quantize as make
    from mmvision_export.quantize.quantize import refuse_unsuitable

    chosen = [name for name, given in zip(FLAVOURS, (int8, fp8, cpu_int8), strict=True) if given]
    if len(chosen) != 1:
        raise typer.BadParameter("choose one of --int8, --fp8, --cpu-int8")
    if image and calibration:
        raise typer.BadParameter("give either --image or --calibration")
    directory = the_model(model)
    if calibration is not None:
        if not calibration.is_dir():
            raise QuantizationError(f"{calibration}: no such folder")
        image = [calibration]
    files = files_of(image) if image else None
    if image and not files:
        raise QuantizationError(f"no file matches {' '.join(map(str, image))}")
    manifest = Manifest.read(directory)
    flavour = chosen[0]
    refuse_unsuitable(directory, manifest, flavour, min_cosine=min_cosine, force=force)
    if dry_run:
        _plan(directory, flavour, files, min_cosine, as_json=as_json)
        return
    measured, held_out, distinct = _batches(directory, manifest, files)
    with progress_display() as progress:
        report = make(
            directory,
            manifest,
            flavour,
            calibration=measured,
            held_out=held_out,
            method=calibration_method,
            min_cosine=min_cosine,
            force=force,
            progress=progress,
        )
    path = directory / flavour_graph(flavour)
    _warn(report, distinct)
    if as_json:
        print_json({"kind": "quantization", "path": path, **report.to_dict()})
    else:
        _print(report, path)


def _batches(
    directory: Path, manifest: Manifest, images: list[Path] | None
) -> tuple[list[Batch], list[Batch], int]:
    """What to calibrate on, what to hold out, and how many different photographs that is."""
    from mmvision_export.artifacts.preprocessing import preprocessor_of
    from mmvision_export.models.sample_batches import PARITY_GRIDS, sample_batch
    from mmvision_export.quantize.photographs import batches_of

    if not images:
        messages.print(
            "note: calibrating on random images; name your own with --image or --calibration"
        )
        config = manifest.config
        grids = list(PARITY_GRIDS.values())
        return (
            [sample_batch(grid, config, seed=seed) for seed, grid in enumerate(grids)],
            [
                sample_batch(grid, config, seed=seed)
                for seed, grid in enumerate(grids, start=len(grids))
            ],
            0,
        )
    parts = _split(images)
    preprocessor = preprocessor_of(directory, manifest)
    return (
        batches_of(parts.calibration, preprocessor),
        batches_of(parts.held_out, preprocessor, views=parts.views),
        len(parts.held_out),
    )


def _split(images: list[Path]) -> Split:
    from mmvision_export.quantize.photographs import split

    if len(images) < 2:
        raise QuantizationError(
            "at least 2 images are needed, one to calibrate on and one to check with, got 1"
        )
    return split(images)


def _plan(
    directory: Path, flavour: str, images: list[Path] | None, min_cosine: float, *, as_json: bool
) -> None:
    """What a run would do, without doing it."""
    from mmvision_export.graph.load import load_graph
    from mmvision_export.quantize.search import MOST_EVALUATIONS
    from mmvision_export.quantize.units import units_of

    parts = _split(images) if images else None
    units = len(units_of(load_graph(directory / GRAPH)))
    path = directory / flavour_graph(flavour)
    if as_json:
        print_json(
            {
                "kind": "quantization",
                "dry_run": True,
                "path": path,
                "units": units,
                "min_cosine": min_cosine,
                "calibration": [*map(str, parts.calibration)] if parts else [],
                "held_out": [*map(str, parts.held_out)] if parts else [],
                "most_graphs": MOST_EVALUATIONS,
            }
        )
        return
    console.print(
        f"{path}: {units} units, gate {min_cosine}, at most {MOST_EVALUATIONS} graphs are measured",
        markup=False,
    )
    if parts is None:
        console.print("calibrates on seeded random images, and holds out others", markup=False)
        return
    console.print(
        f"calibrates on {len(parts.calibration)} images: {_named(parts.calibration)}", markup=False
    )
    views = f", each in {parts.views} crops and sizes" if parts.views > 1 else ""
    console.print(f"holds out {len(parts.held_out)}{views}: {_named(parts.held_out)}", markup=False)


def _named(images: tuple[Path, ...]) -> str:
    more = len(images) - _NAMED
    return ", ".join(map(str, images[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _warn(report: QuantizationReport, photographs: int) -> None:
    from mmvision_export.quantize.evidence import LEAST_HELD_OUT

    if photographs < LEAST_HELD_OUT:
        messages.print(
            f"warning: {photographs} photographs were held out. Give at least {2 * LEAST_HELD_OUT} images, "
            "of the kinds that will come: fewer say little of the next one",
            markup=False,
        )
    if report.operations < _LITTLE:
        messages.print(
            f"warning: only {report.operations:.0%} of the operations are in 8 bit; the flavour may be no "
            "faster. Lower --min-cosine, or stay with the float graph",
            markup=False,
        )


def _reached_by_all(report: QuantizationReport) -> str:
    # Of a graph that fails no more images are measured than show the failure.
    return f"{'at most ' if report.kept else ''}{report.without_fallback:.6f}"


def _print(report: QuantizationReport, path: Path) -> None:
    if report.kept:
        console.print(f"{'kept in higher precision':44}cosine lost in 8 bit, estimated")
    for name, lost in report.kept.items():
        console.print(f"  {name:42}{lost:.1e}", markup=False)
    total = len(report.kept) + len(report.quantized)
    console.print(
        f"{path}: weights {report.size_bytes / 1e6:.0f} MB, in float32 {report.float_size_bytes / 1e6:.0f} MB\n"
        f"{report.flavour}: {len(report.quantized)} of {total} units and {report.operations:.0%} of the "
        f"operations in 8 bit\n"
        f"smallest cosine of a token {report.reached:.6f} in {report.held_out} images held out and "
        f"{report.calibration} of the calibration\n"
        f"gate {report.min_cosine} with a margin of {report.margin}: at least "
        f"{1 - (1 - report.min_cosine) / report.margin:.6f}; {_reached_by_all(report)} with every unit "
        "in 8 bit",
        markup=False,
    )
