"""The `mmvision quantize` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages, progress_display
from mmvision_export.cli.options import ModelOption, Quiet, Verbose, the_model
from mmvision_export.core.errors import QuantizationError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.quantize.choices import FLAVOURS, CalibrationMethod

if TYPE_CHECKING:
    from mmvision_export.quantize.quantize import QuantizationReport
    from mmvision_export.quantize.statistics import Batch

__all__ = ["quantize"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_HELD_OUT = 4  # every fourth image is


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
        typer.Option("--cpu-int8", help="INT8 for ONNX Runtime's CPU provider; needs no ranges."),
    ] = False,
    model: ModelOption = None,
    image: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="FILE", help="Image to calibrate on; may be repeated."),
    ] = None,
    calibration: Annotated[
        Optional[Path], typer.Option(metavar="FOLDER", help="Folder of images to calibrate on.")
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod, typer.Option(help="How much of the largest values is cut off.")
    ] = "minmax",
    min_cosine: Annotated[
        float,
        typer.Option(
            metavar="COSINE",
            help="Gate: smallest cosine of a held-out token with the float32 graph's.",
        ),
    ] = PRECISIONS["int8"].gate.min_cosine,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a quantised flavour of a float32 model directory.

    Layers that cost the most accuracy stay in higher precision, as few as let every token of the
    images held out (a quarter) pass the gate. With no images, calibrates on seeded random ones,
    which is good for a trial only.
    """
    from mmvision_export.quantize.quantize import quantize as make

    chosen = [name for name, given in zip(FLAVOURS, (int8, fp8, cpu_int8), strict=True) if given]
    if len(chosen) != 1:
        raise typer.BadParameter("choose one of --int8, --fp8, --cpu-int8")
    if image and calibration:
        raise typer.BadParameter("give either --image or --calibration")
    directory = the_model(model)
    if calibration is not None:
        if not calibration.is_dir():
            raise QuantizationError(f"{calibration}: no such folder")
        image = sorted(path for path in calibration.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not image:
            raise QuantizationError(
                f"{calibration} holds no images ({', '.join(sorted(_SUFFIXES))})"
            )
    manifest = Manifest.read(directory)
    measured, held_out = _batches(directory, manifest, image)
    with progress_display() as progress:
        report = make(
            directory,
            manifest,
            chosen[0],
            calibration=measured,
            held_out=held_out,
            method=calibration_method,
            min_cosine=min_cosine,
            progress=progress,
        )
    _print(report)


def _batches(
    directory: Path, manifest: Manifest, images: list[Path] | None
) -> tuple[list[Batch], list[Batch]]:
    from mmvision_export.artifacts.preprocessing import preprocessor_of
    from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
    from mmvision_export.models.sample_batches import PARITY_GRIDS, sample_batch

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
        )
    if len(images) < 2:
        raise QuantizationError(
            "at least 2 images are needed, to calibrate on and to check with, got 1"
        )
    decoder = ImageDecoder(preprocessor_of(directory, manifest), draft=False)
    packed = [decoder.batch([path]) for path in images]
    batches = [(batch.pixel_values, batch.grid.rows) for batch in packed]
    held_out = set(range(_HELD_OUT - 1, len(batches), _HELD_OUT)) or {len(batches) - 1}
    return (
        [batch for index, batch in enumerate(batches) if index not in held_out],
        [batches[index] for index in sorted(held_out)],
    )


def _print(report: QuantizationReport) -> None:
    if report.kept:
        console.print(f"{'kept in higher precision':44}cosine if quantised alone")
    for name, cosine in report.kept.items():
        console.print(f"  {name:42}{cosine:.6f}", markup=False)
    total = len(report.kept) + len(report.quantized)
    console.print(
        f"{report.flavour}: {len(report.quantized)} of {total} units quantised, "
        f"smallest cosine of a held-out token {report.reached:.6f} "
        f"(gate {report.min_cosine}; {report.without_fallback:.6f} with all of them)",
        markup=False,
    )
