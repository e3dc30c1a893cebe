"""`mmvision run`, or `python -m mmvision_export.run`.

Images, a video, or patches, to image embeddings.

Prints a few lines on a terminal; elsewhere, and with `--json`, one JSON object, of a folder of images
one line for each. Needs numpy, pillow and one backend; for a video PyAV too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmvision_export.artifacts.manifest import find_model_directory
from mmvision_export.core.command import ProgressLine, elapsed_line, exit_code_of
from mmvision_export.core.errors import InputError, print_error
from mmvision_export.core.files import array_from_file
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.memory import gigabytes
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, checked_batch
from mmvision_export.models.minimax_m3_vl.preprocess import batch_from_images
from mmvision_export.runtime.embeds_file import (
    EmbedsFile,
    embeds_file,
    refuse_existing_file,
    refuse_unknown_format,
)
from mmvision_export.runtime.folder import STATUSES, encode_folder, run_identity
from mmvision_export.runtime.folder_files import files_below
from mmvision_export.runtime.folder_record import refuse_foreign_output
from mmvision_export.runtime.given_images import from_standard_input
from mmvision_export.runtime.run_arguments import arguments_of_run
from mmvision_export.runtime.run_summary import (
    engines_passed_over,
    in_words,
    printed_facts,
    wants_json,
)
from mmvision_export.runtime.vision_encoder import VisionEncoder

__all__ = ["main"]

_HUGE_PATCHES = 16384
"""Of a larger image, what it needs is said before it is begun."""

_TEST_PATTERN = "test pattern, 448 x 448"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m mmvision_export.run") -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name, `sys.argv` if None.
        prog: What its help calls it.

    Returns:
        The exit code: 0; 1 after an error, or if an image of a folder failed; 130 when interrupted.

    Raises:
        SystemExit: With 2, after wrong usage; with 0, after `--help` or `--version`.
    """

    def work() -> int:
        # Within: help that cannot be written is an error as any other.
        arguments = arguments_of_run(argv, prog)
        return (_print_folder if arguments.folder else _print_summary)(arguments)

    return exit_code_of(work, verbose="--verbose" in (sys.argv if argv is None else argv))


def _print_summary(arguments: argparse.Namespace) -> int:
    with from_standard_input(arguments.image) as images:
        arguments.files = images
        result = {"kind": "run", **_run(arguments)}
    as_json = wants_json(arguments.json)
    print(json.dumps(result, indent=2) if as_json else in_words(result), flush=True)
    return 0


def _opened(arguments: argparse.Namespace) -> VisionEncoder:
    encoder = VisionEncoder.open(
        find_model_directory(arguments.model),
        resize=arguments.resize,
        max_long_side=arguments.max_long_side,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        capture_on_open=arguments.capture_on_open,
        flavour=arguments.flavour,
        kernel_library=arguments.kernel_library,
        precision=arguments.precision,
        max_patches=arguments.max_patches,
        max_images=arguments.max_images,
        weight_budget=arguments.weight_budget,
        trust=arguments.trust,
        verify=arguments.verify,
        progress=_progress(arguments),
    )
    if not arguments.quiet:
        for reason in engines_passed_over(encoder.info):
            print(f"note: passed over {reason}", file=sys.stderr, flush=True)
    return encoder


def _progress(arguments: argparse.Namespace) -> Progress:
    return Progress() if arguments.quiet else ProgressLine()


def _decoder(arguments: argparse.Namespace, encoder: VisionEncoder) -> ImageDecoder:
    preprocessor = encoder.preprocessor_for(resize_to_fit=arguments.resize_to_fit)
    return ImageDecoder(preprocessor, max_pixels=arguments.max_pixels, draft=arguments.draft)


def _print_folder(arguments: argparse.Namespace) -> int:
    counts = dict.fromkeys(STATUSES, 0)
    # Before a model is opened: that takes a while, and this may refuse.
    listed = files_below(arguments.image)
    as_json = wants_json(arguments.json)
    progress = _progress(arguments)
    with _opened(arguments) as encoder:
        identity = run_identity(
            encoder, resize_to_fit=arguments.resize_to_fit, draft=arguments.draft
        )
        refuse_foreign_output(arguments.output, arguments.image, identity, force=arguments.force)
        progress.step("encoding", total=len(listed.files))
        for report in encode_folder(
            encoder,
            _decoder(arguments, encoder),
            listed,
            arguments.output,
            arguments.format or "npy",
            force=arguments.force,
        ):
            counts[report["status"]] += 1
            if as_json:
                print(json.dumps({"kind": "file", **report}), flush=True)
            if "error" in report:
                print_error(report["error"])
            progress.advance()
        facts = printed_facts(encoder.info, verbose=arguments.verbose)
        result = {"kind": "folder", **facts, "output": str(arguments.output), "files": counts}
        print(json.dumps(result) if as_json else in_words(result), flush=True)
    if not sum(counts.values()):
        raise InputError(f"no files in {', '.join(map(str, arguments.image))}")
    return 1 if counts["failed"] else 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    output: Path | None = arguments.output
    if output is not None:
        refuse_unknown_format(output)
        if not arguments.force:
            refuse_existing_file(output, of_a_video=arguments.video is not None)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        encoder = stack.enter_context(_opened(arguments))
        opened = time.perf_counter()
        # Before the work rather than after it: what cannot be written is an error now.
        file = None if output is None else stack.enter_context(embeds_file(output))
        if arguments.video is not None:
            summary = _encode_video(arguments, encoder, file)
        else:
            summary = _encode_batch(arguments, encoder, file)
    summary["milliseconds"] = {"open": round((opened - start) * 1e3, 3), **summary["milliseconds"]}
    facts = printed_facts(encoder.info, verbose=arguments.verbose)
    return {**facts, **summary, "output": None if output is None else str(output)}


def _encode_batch(
    arguments: argparse.Namespace, encoder: VisionEncoder, file: EmbedsFile | None
) -> dict[str, Any]:
    start = time.perf_counter()
    inputs, batch = _inputs(arguments, encoder)
    prepared = time.perf_counter()
    if not arguments.quiet:
        _say_memory(encoder, batch)
    with elapsed_line(f"encoding {batch.grid.num_patches} patches", quiet=arguments.quiet):
        image_embeds = encoder.encode(batch)
    encoded = time.perf_counter()
    grid = batch.grid
    if file is not None:
        names = (
            inputs
            if len(inputs) == len(grid)
            else [f"{inputs[0]}, row {row}" for row in range(len(grid))]
        )
        for name, row, embeds in zip(names, grid.tuples(), grid.split(image_embeds), strict=True):
            file.add(name, row, embeds)
    return {
        "inputs": inputs,
        "pixel_values": list(batch.pixel_values.shape),
        "grid_thw": grid.rows.tolist(),
        "image_embeds": list(image_embeds.shape),
        "dtype": str(image_embeds.dtype),
        "tokens_per_image": grid.tokens_per_image,
        "milliseconds": {
            "preprocess": round((prepared - start) * 1e3, 3),
            "encode": round((encoded - prepared) * 1e3, 3),
        },
    }


def _say_memory(encoder: VisionEncoder, batch: PackedBatch) -> None:
    """Of a huge image, say on standard error what it needs before it is begun."""
    patches = max(batch.grid.patches_per_image)
    need = encoder.memory_for(patches)
    if patches <= _HUGE_PATCHES or need is None:
        return
    available = encoder.available_bytes()
    room = "" if available is None else f"; {gigabytes(available)} are available"
    print(f"an image of {patches} patches needs up to {need}{room}", file=sys.stderr, flush=True)


def _encode_video(
    arguments: argparse.Namespace, encoder: VisionEncoder, file: EmbedsFile | None
) -> dict[str, Any]:
    start = time.perf_counter()
    segments: list[dict[str, Any]] = []
    tokens = 0
    fps = 1.0 if arguments.fps is None else arguments.fps
    for segment in encoder.encode_video(
        arguments.video,
        fps=fps,
        resize_to_fit=arguments.resize_to_fit,
        max_pixels=arguments.max_pixels,
        progress=_progress(arguments),
    ):
        if file is not None:
            file.add(
                str(arguments.video), segment.grid_thw, segment.image_embeds, segment.timestamps
            )
        tokens += len(segment.image_embeds)
        segments.append(
            {
                "timestamps": list(segment.timestamps),
                "grid_thw": list(segment.grid_thw),
                "tokens": len(segment.image_embeds),
            }
        )
    return {
        "inputs": [str(arguments.video)],
        "segments": segments,
        "image_embeds": [tokens, encoder.config.text_hidden_size],
        "dtype": str(encoder.dtype),
        "milliseconds": {"decode_and_encode": round((time.perf_counter() - start) * 1e3, 3)},
    }


def _inputs(arguments: argparse.Namespace, encoder: VisionEncoder) -> tuple[list[str], PackedBatch]:
    if arguments.pixel_values is not None:
        paths = (arguments.pixel_values, arguments.grid_thw)
        pixel_values, grid_thw = (array_from_file(path) for path in paths)
        batch = checked_batch(pixel_values, grid_thw, encoder.config, encoder.dtype)
        return [str(path) for path in paths], batch
    if arguments.image:
        batch = _decoder(arguments, encoder).batch(arguments.files, dtype=encoder.dtype)
        return [str(path) for path in arguments.image], batch  # as named: - is standard input
    preprocessor = encoder.preprocessor_for(resize_to_fit=arguments.resize_to_fit)
    return [_TEST_PATTERN], batch_from_images([_test_pattern()], preprocessor)


def _test_pattern() -> Image.Image:
    row = np.linspace(0, 255, 448, dtype=np.uint8)
    red, green = np.meshgrid(row, row)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


if __name__ == "__main__":
    sys.exit(main())
