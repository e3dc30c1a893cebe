"""The `mmvision triton-repository` command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console, progress_display
from mmvision_export.cli.options import AsJson, Quiet, Verbose, print_json, the_model
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS

__all__ = ["triton_repository"]


@examples(
    "mmvision triton-repository --model engines/MiniMax-M3 --output models",
    "mmvision triton-repository --model engines/MiniMax-M3/plans/x.engine --output models",
)
def triton_repository(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model repository.")],
    model: Annotated[
        Optional[Path],
        typer.Option(
            "--model",
            metavar="DIR|ENGINE",
            help="Model directory, or one engine in its plans/. Default: the only one in engines/.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the server's model.")
    ] = "vision_encoder",
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Backend, as in mmvision run. Default: the first that works."
        ),
    ] = "auto",
    threads: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Threads of a CPU backend in each instance.", min=1),
    ] = None,
    instances: Annotated[
        int,
        typer.Option(
            metavar="N", help="Encoders that work at once. With GPUs: on each GPU.", min=1
        ),
    ] = 1,
    max_delay_ms: Annotated[
        float,
        typer.Option(
            metavar="MS", help="How long a request may wait for others.", min=0, max=60_000
        ),
    ] = 5,
    max_requests: Annotated[
        int, typer.Option(metavar="N", help="Most requests that the server gathers.", min=1)
    ] = 64,
    resize_to_fit: Annotated[
        bool,
        typer.Option("--resize-to-fit", help="Shrink an image that is too large for the engine."),
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Most pixels of an image, before decoding.", min=1)
    ] = MAX_FILE_PIXELS,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the repository if it exists.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model repository for Triton Inference Server.

    The model takes encoded images, or patches with grid_thw, and packs requests of different sizes into
    one call. Beside it lies the graph for the server's ONNX Runtime backend, or the engine for its
    TensorRT backend.
    """
    from mmvision_export.triton_server.config import ServerSettings
    from mmvision_export.triton_server.repository import write_repository

    settings = ServerSettings(
        backend=backend,
        threads=threads,
        instances=instances,
        max_delay_ms=max_delay_ms,
        max_requests=max_requests,
        resize_to_fit=resize_to_fit,
        max_pixels=max_pixels,
    )
    with progress_display() as progress:
        written = write_repository(
            the_model(model),
            output,
            settings,
            name=name,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({"kind": "triton repository", **dataclasses.asdict(written)})
        return
    beside = "" if written.raw_model is None else f", {written.raw_model}"
    console.print(f"{written.path}: {written.model}{beside}", markup=False)
    console.print(
        f"next: tritonserver --model-repository {written.path} --model-control-mode explicit "
        f"--load-model {written.model}",
        markup=False,
    )
