"""The `mmvision verify` command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmvision_export.cli.command import call, examples
from mmvision_export.cli.console import console, progress_display
from mmvision_export.cli.options import AsJson, Quiet, Verbose, print_json
from mmvision_export.core.errors import print_error

if TYPE_CHECKING:
    from mmvision_export.bundle.check import SampleResult
    from mmvision_export.bundle.record import BundleRecord

__all__ = ["verify"]


@examples(
    "mmvision verify MiniMax-M3-orin.tar",
    "mmvision verify engines/MiniMax-M3",
    "mmvision verify MiniMax-M3-cpu --run",
)
def verify(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(metavar="DIR|TAR", help="Bundle, unpacked or not, or model directory."),
    ],
    run: Annotated[
        bool,
        typer.Option("--run", help="Encode the bundle's patches here, and compare."),
    ] = False,
    build: Annotated[
        bool, typer.Option("--build", help="With --run: build an engine if none fits.")
    ] = False,
    backend: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME", help="With --run: backend, as in mmvision run. Default: the target's."
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="With --run: also load engines that you have not built here. Engines are executable content.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find damage in a bundle or a model directory.

    The command compares every file with its recorded hash. For a bundle's archive, it compares every byte.
    With --run it also encodes the patches of an unpacked bundle and compares the embeddings with those
    stored. It exits with 1 if anything differs.
    """
    from mmvision_export.bundle.check import check_sample
    from mmvision_export.bundle.integrity import verify_files

    if (build or backend or trust) and not run:
        raise typer.BadParameter("--build, --backend and --trust go with --run")
    with progress_display() as progress:
        found = verify_files(path, progress=progress)
    result = None
    if run and not found.problems:
        if found.kind != "bundle" or found.record is None:
            raise typer.BadParameter(
                f"--run takes an unpacked bundle, {path} is no such: "
                + ("tar xf unpacks it" if found.kind == "archive" else "see mmvision parity")
            )
        with progress_display() as progress:
            result = check_sample(
                path,
                found.record,
                backend=backend,
                trust=trust or None,
                build=_builder(context, path, found.record) if build else None,
                progress=progress,
            )
    passed = not found.problems and (result is None or not result.failures)
    if as_json:
        print_json(
            {
                "kind": "verify",
                "path": path,
                "what": found.kind,
                "passed": passed,
                "files": found.files,
                "size_bytes": found.size_bytes,
                "problems": found.problems,
                "sample": None
                if result is None
                else {**dataclasses.asdict(result), "distance": result.distance.to_dict()},
            }
        )
    else:
        console.print(
            f"{path}: {found.kind}, {found.files} files, {found.size_bytes / 1e6:.1f} MB: "
            + (f"{len(found.problems)} damaged" if found.problems else "all as they were written"),
            markup=False,
        )
        if result is not None:
            _print_sample(result, found.record)
    for name, problem in found.problems.items():
        print_error(problem if name in problem else f"{name}: {problem}", None)
    if result is not None:
        for failure in result.failures:
            print_error(f"{result.runs}: {failure}", "see: .venv/bin/mmvision doctor")
    if not passed:
        raise typer.Exit(1)


def _print_sample(result: SampleResult, record: BundleRecord | None) -> None:
    graph = "" if record is None else f" of {record.sample_graph}"
    console.print(
        f"{'FAILED' if result.failures else 'PASSED'}: {result.backend}, {result.runs}, {result.precision}: "
        f"{result.images} images, {result.tokens} tokens in {1000 * result.seconds:.1f} ms; "
        f"relative L2 {result.distance.relative_l2:.1e}, minimum cosine {result.distance.min_cosine:.7f} "
        f"from the stored embeddings{graph} (gate: {result.gate})",
        markup=False,
    )


def _builder(context: typer.Context, folder: Path, record: BundleRecord) -> Callable[[], None]:
    """Calls `mmvision build-engine` as its user would on the target."""

    def build() -> None:
        from mmvision_export.artifacts.plugin_library import LIBRARY
        from mmvision_export.bundle.record import BUNDLE_MODEL, BUNDLE_PLUGINS

        library = folder / BUNDLE_PLUGINS / LIBRARY
        arguments = ["build-engine", *record.build, "--model", str(folder / BUNDLE_MODEL)]
        if library.is_file():
            arguments += ["--plugin-library", str(library)]
        call(context, *arguments)

    return build
