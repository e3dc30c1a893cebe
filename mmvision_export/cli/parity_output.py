"""What `mmvision parity` reads and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.preprocessing import preprocessor_of
from mmvision_export.artifacts.verdicts import standing_failures
from mmvision_export.cli.console import console
from mmvision_export.core.errors import InputError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.parity.result import ParityResult
from mmvision_export.parity.samples import Sample, sample_from_files, samples_from_images
from mmvision_export.runtime.given_images import files_of

__all__ = ["print_parity", "samples_from_options", "standing_lines"]


def samples_from_options(
    directory: Path,
    manifest: Manifest,
    *,
    images: Sequence[Path],
    pixel_values: Path | None,
    grid_thw: Path | None,
) -> list[Sample]:
    """The batches that were asked for, or nothing for the default ones.

    Raises:
        ManifestError, ConfigError: The model directory's preprocessor is missing or malformed.
        InputError: A file is missing, or is not what the encoder takes.
    """
    if images:
        found = files_of(images)
        if not found:
            patterns = ", ".join(map(str, images))
            raise InputError(f"no file matches {patterns}", reason="missing")
        return samples_from_images(found, preprocessor_of(directory, manifest))
    if pixel_values is not None and grid_thw is not None:
        return [sample_from_files(pixel_values, grid_thw, manifest.config)]
    return []


def print_parity(result: ParityResult) -> None:
    """The tables and, for each graph, where its error comes from."""
    console.print(
        f"{'distance from PyTorch in float64':34}patches  max abs  relative L2  min cosine"
    )
    before = None
    for row in result.rows:
        if row.runner != before:
            console.print(f"[bold]{escape(row.runner)}")
            before = row.runner
        distance = row.metrics
        verdict = "" if row.subject is None else "[red]FAIL" if row.failures else "[green]pass"
        console.print(
            f"  {row.sample:32}{row.patches:7}  {distance.max_abs:7.1e}  {distance.relative_l2:11.2e}  "
            f"{distance.min_cosine:10.7f}  {verdict}"
        )
    console.print(f"\nlayer by layer, on {result.layers.sample}", markup=False)
    for name, graph in result.layers.graphs.items():
        if not graph.stages:
            console.print(
                f"  {name}: nothing to see, its stages have no values of their own", markup=False
            )
            continue
        if graph.jump is None:
            said = "the error grows as its precision explains"
        else:
            said = f"the error jumps at {graph.jump.stage}: {graph.jump.reason}"
        if graph.missing:
            said += (
                f", as far as it shows: it has no value of its own for {', '.join(graph.missing)}"
            )
        console.print(f"  {name}: {said}", markup=False)
    largest = max(result.layers.magnitudes, key=lambda magnitude: magnitude.value)
    console.print(f"  largest activation: {largest.value:.4g}, {largest.where}", markup=False)
    for warning in result.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}")
    for precision in dict.fromkeys(row.precision for row in result.rows):
        console.print(f"{precision} gate: {PRECISIONS[precision].gate.describe()}", markup=False)


def standing_lines(result: ParityResult, manifest: Manifest) -> list[str]:
    """Failures of earlier comparisons that this one did not repeat, in words.

    Args:
        result: Of this comparison.
        manifest: As it is with this comparison recorded.
    """
    now = {sample.sha256 for sample in result.samples}
    subjects = dict.fromkeys(row.subject for row in result.rows if row.subject is not None)
    return [
        f"an earlier failure stands: {verdict.describe()}"
        for subject in subjects
        for verdict in standing_failures(manifest.parity.get(subject))
        if verdict.sample_sha256 not in now
    ]
