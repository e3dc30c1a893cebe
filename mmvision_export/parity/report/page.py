"""The report: one HTML file, and every number in a JSON file of the same stem."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

from mmvision_export.core.atomic import new_files, refuse_unwritable
from mmvision_export.core.errors import OutputError, ParityError
from mmvision_export.core.install import install_command
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.parity.advice import next_step_of
from mmvision_export.parity.jump import EXCESS
from mmvision_export.parity.magnitudes import FLOAT16_MAX, NEAR_OVERFLOW
from mmvision_export.parity.report.maps import image_maps
from mmvision_export.parity.result import ParityResult, ParityRow
from mmvision_export.version import __version__

__all__ = ["checked_report_path", "record_from_parity", "write_report"]

_TEMPLATE = "report.html.j2"
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "polygraphy", "numpy")


def checked_report_path(path: Path, *, force: bool) -> Path:
    """Refuse a report that could not be written in the end, before the work.

    Raises:
        OutputError: It does not end in .html, or is there already, or its JSON is, and may not be
            replaced.
        ParityError: A package that draws it is not installed.
    """
    if path.suffix != ".html":
        raise OutputError(f"--report must end in .html, got {path}")
    for file in (path, path.with_suffix(".json")):
        if file.exists() and not force:
            raise OutputError(
                f"{file} already exists", hint="choose another --report, or replace it with --force"
            )
    refuse_unwritable(path.parent)
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ParityError(f"a report needs {package}", hint=install_command("parity")) from None
    return path


def record_from_parity(result: ParityResult) -> dict[str, Any]:
    """Everything that was measured, as JSON values; what is not a finite number is None."""
    layers = result.layers
    graphs = {
        name: {
            "precision": graph.facts.precision,
            "float_type": graph.facts.float_type,
            "jump": None if graph.jump is None else vars(graph.jump),
            "missing": graph.missing,
            "stages": [
                {
                    "stage": row.stage,
                    "expected_relative_l2": expected,
                    "largest": row.largest,
                    "headroom": row.headroom,
                    **row.distance.to_dict(),
                }
                for row, expected in zip(graph.stages, layers.expected(graph), strict=True)
            ],
        }
        for name, graph in layers.graphs.items()
    }
    record: dict[str, Any] = {
        "kind": "parity",
        "format": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": result.directory.resolve().name,
        "passed": result.passed,
        "warnings": result.warnings,
        "gates": {
            precision: PRECISIONS[precision].gate.describe()
            for precision in {row.precision for row in result.rows}
        },
        "samples": {
            sample.name: {
                "patches": sample.num_patches,
                "grid_thw": sample.grid_thw.tolist(),
                "files": sample.files,
            }
            for sample in result.samples
        },
        "rows": [row.to_dict() for row in result.rows],
        "layers": {
            "sample": layers.sample,
            "graphs": graphs,
            "magnitudes": [vars(magnitude) for magnitude in layers.magnitudes],
        },
        "source": result.manifest.source,
        "config": result.manifest.config.to_json(),
        "files": {name: file.sha256 for name, file in result.manifest.files.items()},
        "versions": {
            "exported with": result.manifest.versions,
            "compared with": {"mmvision-export": __version__}
            | {name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
    finite: dict[str, Any] = _finite(record)
    return finite


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(path: Path, result: ParityResult, *, force: bool = False) -> None:
    """Write the report, and its numbers as JSON beside it.

    Raises:
        OutputError: See `checked_report_path`; or the files cannot be written.
    """
    checked_report_path(path, force=force)
    record = record_from_parity(result)
    with new_files(path.parent, name=path.name) as new:
        (new / path.name).write_text(
            _html(record, result, path.with_suffix(".json").name), encoding="utf-8"
        )
        (new / path.with_suffix(".json").name).write_text(
            json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def _html(record: dict[str, Any], result: ParityResult, json_name: str) -> str:
    import jinja2

    from mmvision_export.parity.report.figures import error_figure, magnitude_figure

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["from_one"] = lambda cosine: _number(
        1 - cosine if cosine is not None else None
    )
    sample = next(sample for sample in result.samples if sample.name == result.layers.sample)
    merge = result.manifest.config.spatial_merge_size
    errors = {
        row.runner: row.token_errors
        for row in result.rows
        if row.subject is not None and row.sample == sample.name
    }
    page: str = environment.get_template(_TEMPLATE).render(
        record=record,
        json_name=json_name,
        verdicts=_verdicts(result),
        rows=result.rows,
        layers=result.layers,
        error_svg=error_figure(result.layers),
        magnitude_svg=magnitude_figure(result.layers),
        images=image_maps(sample, errors, merge) if errors else [],
        num_images=len(sample.grid_thw),
        largest=max(result.layers.magnitudes, key=lambda magnitude: magnitude.value),
        float16_max=FLOAT16_MAX,
        near=NEAR_OVERFLOW,
        excess=EXCESS,
        merge=merge,
    )
    return page


def _verdicts(result: ParityResult) -> list[dict[str, Any]]:
    """One line per thing that was compared: its worst sample, and where its error comes from.

    Those that failed come first.
    """
    found = []
    for runner in dict.fromkeys(row.runner for row in result.rows if row.subject is not None):
        rows = [row for row in result.rows if row.runner == runner]
        worst = max(rows, key=_badness)
        graph = result.layers.graphs.get(str(worst.subject))
        found.append(
            {
                "runner": runner,
                "precision": worst.precision,
                "passed": not any(row.failures for row in rows),
                "worst": worst,
                "min_cosine": min(
                    rows, key=lambda row: _or(row.metrics.min_cosine, -1.0)
                ).metrics.min_cosine,
                "failures": [
                    f"{row.sample}: {failure}" for row in rows for failure in row.failures
                ],
                "next_step": next_step_of(worst, model=result.directory.name)
                if worst.failures
                else None,
                "jump": None if graph is None else graph.jump,
                "stages": graph is not None and bool(graph.stages),
            }
        )
    return sorted(found, key=lambda verdict: bool(verdict["passed"]))


def _badness(row: ParityRow) -> tuple[bool, int, float]:
    return bool(row.failures), row.metrics.non_finite, _or(row.metrics.relative_l2, 0.0)


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return (
        f"{value:.{digits}e}"
        if value and not 1e-2 <= abs(value) < 1e5
        else f"{value:.{digits + 2}g}"
    )
