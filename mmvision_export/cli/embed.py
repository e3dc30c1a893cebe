"""The `mmvision embed` command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, messages
from mmvision_export.cli.options import AsJson, ModelOption, Quiet, Verbose, print_json, the_model
from mmvision_export.core.command import ProgressLine
from mmvision_export.core.progress import Progress
from mmvision_export.embed.settings import DEFAULT_ROWS_PER_PART
from mmvision_export.embed.stored import StoredType
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS

if TYPE_CHECKING:
    from mmvision_export.embed.on_ray import RayWorkers
    from mmvision_export.embed.run import EmbedResult

__all__ = ["embed"]


class CountedRows(ProgressLine):
    """Counts rows, and notes on standard error what is worth reading."""

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        messages.print(f"note: {message}", markup=False)


@examples(
    "mmvision embed --input photos/ --output embeds/",
    "mmvision embed --input 'table.parquet' --image-column image --output embeds/ --dry-run",
)
def embed(
    name: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="DIR|PARQUET|URI",
            help="A folder of images; a .parquet file, or a folder of them, with encoded images; or a "
            "URI of either that pyarrow opens.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for the tables embeddings/ and failures/."),
    ],
    model: ModelOption = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Backend, as in mmvision run. Default: the first that works."
        ),
    ] = "auto",
    threads: Annotated[
        Optional[int], typer.Option(metavar="N", help="Threads of a CPU backend.", min=1)
    ] = None,
    flavour: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Graph of the directory, as cpu-int8.")
    ] = None,
    image_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of Parquet with the encoded images.")
    ] = "image",
    id_column: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Column of Parquet with the ids. Default: id, or FILE:ROW without one.",
        ),
    ] = None,
    dtype: Annotated[
        StoredType, typer.Option(help="Type of the embeddings in the table.")
    ] = "bfloat16",
    rows_per_part: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Rows of one output file. A killed run repeats only its unfinished files.",
            min=1,
        ),
    ] = DEFAULT_ROWS_PER_PART,
    patches_per_call: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Patches packed into one call. Default: the engine's largest launch.",
            min=1,
        ),
    ] = None,
    resize_to_fit: Annotated[
        bool,
        typer.Option("--resize-to-fit", help="Shrink an image that is too large for the engine."),
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Most pixels of an image, before decoding.", min=1)
    ] = MAX_FILE_PIXELS,
    draft: Annotated[
        bool, typer.Option(help="Decode large JPEGs at a part of their size; --no-draft is exact.")
    ] = True,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Open engines of the directory that you have not built here."),
    ] = False,
    workers: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Embed on Ray, with this number of encoders. Default: no Ray.", min=1
        ),
    ] = None,
    ray: Annotated[
        Optional[str],
        typer.Option(
            metavar="ADDRESS",
            help="Embed on this Ray cluster, or auto. Default: a cluster that the run starts.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(metavar="N", help="GPUs that Ray reserves for each encoder.", min=0)
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and print what the run would do.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Repeat the parts that have failures, for example after a broken network.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Embed everything again, and replace the tables.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Embed very many images into Parquet.

    The command writes a table of embeddings, and a table of the images that failed. Run it again
    after an interrupt or a kill: it does what is missing, and each image has one row in one of the
    tables. It exits with 1 if an image has failed.
    """
    from mmvision_export.embed.run import embed as run_embed
    from mmvision_export.embed.settings import EmbedSettings
    from mmvision_export.embed.tables import Columns
    from mmvision_export.runtime.backends import BackendOptions

    result = run_embed(
        name,
        output,
        the_model(model),
        options=BackendOptions(
            backend=backend, threads=threads, flavour=flavour, trust=trust or None
        ),
        settings=EmbedSettings(
            dtype=dtype,
            rows_per_part=rows_per_part,
            patches_per_call=patches_per_call,
            resize_to_fit=resize_to_fit,
            max_pixels=max_pixels,
            draft=draft,
        ),
        columns=Columns(image=image_column, id=id_column),
        workers=_workers(workers, ray, gpus_per_worker),
        force=force,
        retry_failed=retry_failed,
        dry_run=dry_run,
        progress=Progress() if quiet else CountedRows(),
    )
    if as_json:
        print_json({"kind": "embed", "dry_run": dry_run, **dataclasses.asdict(result)})
    else:
        console.print(_in_words(result, dry_run=dry_run), markup=False)
    if result.failed or result.already_failed:
        raise typer.Exit(1)


def _workers(count: int | None, address: str | None, gpus_each: float) -> RayWorkers | None:
    from mmvision_export.embed.on_ray import RayWorkers

    if count is None and address is None:
        if gpus_each:
            raise typer.BadParameter("--gpus-per-worker goes with --workers or --ray")
        return None
    return RayWorkers(count=count or 1, gpus_each=gpus_each, address=address)


def _in_words(result: EmbedResult, *, dry_run: bool) -> str:
    there = (
        f"already there: {result.already_embedded} embedded, {result.already_failed} failed; "
        f"of {result.rows} rows"
    )
    if dry_run:
        missing = result.rows - result.already_embedded - result.already_failed
        return f"{result.output}: would embed {missing}; {there}"
    return f"{result.output}: {result.embedded} embedded, {result.failed} failed; {there}"
