"""The command's work: which sides, then measuring, then what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.artifacts.manifest import Manifest, flavour_graph
from mmvision_export.benchmark.measure import measure
from mmvision_export.benchmark.report import page_from_result
from mmvision_export.benchmark.result import Result, result_from_file
from mmvision_export.benchmark.sides import PEERS, without_precision
from mmvision_export.benchmark.workloads import workloads_for
from mmvision_export.core.atomic import new_files, refuse_unwritable
from mmvision_export.core.errors import BenchmarkError, OutputError
from mmvision_export.core.progress import Progress
from mmvision_export.runtime.backends import BACKENDS

__all__ = ["page_from_file", "run_benchmark", "sides_from"]

RESULTS = "results.json"

INT8_GRAPH = flavour_graph("cpu-int8")
"""The graph that precision `int8` stands for."""


def sides_from(
    manifest: Manifest, *, backends: Sequence[str], precisions: Sequence[str], peers: Sequence[str]
) -> list[str]:
    """The sides of a comparison by name, the first being what the others are compared with.

    Raises:
        BenchmarkError: A backend, precision or peer that there is not, or a graph the directory has
            not.
    """
    sides = []
    for backend in backends:
        name, _, graph = backend.partition(":")
        plain, asked = without_precision(name)
        if asked is not None and plain == "openvino" and not graph:
            sides.append(backend)
            continue
        if name not in BACKENDS:
            raise BenchmarkError(
                f"no such backend: {name}",
                hint=f"choose from: {', '.join(BACKENDS)}, openvino-bf16",
            )
        if graph and (graph not in manifest.files or name != "onnxruntime-cpu"):
            graphs = ", ".join(file for file in manifest.files if file.endswith(".onnx"))
            raise BenchmarkError(f"{backend}: only onnxruntime-cpu takes a graph, one of {graphs}")
        for precision in [manifest.precision] if graph or name != "onnxruntime-cpu" else precisions:
            if precision == "int8":
                if INT8_GRAPH not in manifest.files:
                    raise BenchmarkError(
                        f"the model directory has no {INT8_GRAPH}", hint="use --precision fp32"
                    )
                sides.append(f"{name}:{INT8_GRAPH}")
            elif precision == manifest.precision:
                sides.append(backend)
            else:
                raise BenchmarkError(f"the model is {manifest.precision}, not {precision}")
    for peer in peers:
        if peer not in PEERS:
            raise BenchmarkError(f"no such peer: {peer}", hint=f"choose from: {', '.join(PEERS)}")
    return [*sides, *peers]


def _refuse_existing(results: Path | None, page: Path | None, *, force: bool) -> None:
    """Refuse before the work what would be refused, or lost, after it."""
    if page is not None and page.suffix != ".md":
        raise OutputError(f"the page is Markdown: its name must end in .md, got {page}")
    for path in (results, page):
        if path is not None and path.exists() and not force:
            raise OutputError(
                f"{path} already exists", hint="replace it with --force, or name another place"
            )


def run_benchmark(
    directory: Path,
    *,
    backends: Sequence[str],
    precisions: Sequence[str],
    peers: Sequence[str],
    workloads: str,
    threads: int | None,
    repeats: int,
    seconds_per_workload: float,
    output: Path,
    page: Path | None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Result, Path]:
    """Measure, writing `results.json` and the charts after every workload, and the page at last.

    Raises:
        BenchmarkError: See `sides_from` and `measure`.
        ManifestError: The model directory is not one.
        OutputError: The files are there already, or cannot be written.
    """
    # Without matplotlib it is an error now and not after the work.
    from mmvision_export.benchmark.charts import write_charts

    progress = progress or Progress()
    _refuse_existing(output / RESULTS, page, force=force)
    for folder in (output, *([] if page is None else [page.parent])):
        refuse_unwritable(folder)
    manifest = Manifest.read(directory)
    sides = sides_from(manifest, backends=backends, precisions=precisions, peers=peers)

    def keep(result: Result) -> None:
        with new_files(output, name=RESULTS) as new:
            _write_results(result, new)
            write_charts(result, new)
        kept.append(result)

    kept: list[Result] = []
    try:
        result = measure(
            directory,
            sides,
            workloads_for(workloads),
            workload_set=workloads,
            threads=threads or os.cpu_count() or 1,
            repeats=repeats,
            seconds_per_workload=seconds_per_workload,
            keep=keep,
            progress=progress,
        )
    except KeyboardInterrupt:
        if kept:
            progress.note(f"{len(kept)} workload(s) were finished and are kept: {output / RESULTS}")
        raise
    if page is not None:
        _write_page(result, page)
    return result, output


def page_from_file(results: Path, page: Path, *, force: bool = False) -> Result:
    """Write the page and its charts from a `results.json`, and measure nothing.

    The charts and the results lie in a folder of the page's stem beside the page.

    Raises:
        BenchmarkError: The file is no result.
        InputError: The file is missing or no JSON.
        OutputError: The page is there already, is no Markdown file, or cannot be written.
    """
    _refuse_existing(None, page, force=force)
    refuse_unwritable(page.parent)
    result = result_from_file(results)
    _write_page(result, page)
    return result


def _write_page(result: Result, page: Path) -> None:
    from mmvision_export.benchmark.charts import write_charts

    with new_files(page.parent / page.stem, name="charts") as new:
        _write_results(result, new)  # from which the page can be written anew
        write_charts(result, new)
    with new_files(page.parent, name=page.name) as new:
        (new / page.name).write_text(page_from_result(result, plots=page.stem), encoding="utf-8")


def _write_results(result: Result, folder: Path) -> None:
    content = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    (folder / RESULTS).write_text(content + "\n", encoding="utf-8")
