"""`mmvision run`, or `python -m mmvision_export.run`.

Images, a video, or patches, to image embeddings.

Prints one JSON object on standard output, of a folder of images one line for each. Needs numpy,
pillow and one backend; for a video PyAV too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from mmvision_export.artifacts.manifest import find_model_directory
from mmvision_export.core.command import ProgressLine, exit_code_of
from mmvision_export.core.errors import InputError, OutputError, print_error
from mmvision_export.core.files import array_from_file
from mmvision_export.core.verified_files import VERIFY
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.models.minimax_m3_vl.memory import gigabytes
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch, checked_batch
from mmvision_export.models.minimax_m3_vl.preprocess import batch_from_images
from mmvision_export.models.minimax_m3_vl.resize import RESIZE_RULES
from mmvision_export.runtime.backends import BACKENDS
from mmvision_export.runtime.embeds_file import (
    FORMATS,
    EmbedsFile,
    embeds_file,
    refuse_unknown_format,
)
from mmvision_export.runtime.folder import STATUSES, encode_folder, run_identity
from mmvision_export.runtime.folder_files import files_below
from mmvision_export.runtime.folder_record import refuse_foreign_output
from mmvision_export.runtime.vision_encoder import VisionEncoder
from mmvision_export.version import __version__

__all__ = ["main"]

_HUGE_PATCHES = 16384
"""Of a larger image, what it needs is said before it is begun."""

_TEST_PATTERN = "test pattern, 448 x 448"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        print_error(message, f"{self.prog} --help")
        self.exit(2)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Encode images or a video with the vision encoder and print a summary as JSON; "
        "of a folder, one line for each image. With no input, encodes a test pattern, to see that "
        "everything works.",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="model directory, or an .engine file (default: the "
                       "only one under engines/)")  # fmt: skip
    model.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="runtime (default: %(default)s, "
                       "the fastest that works here)")  # fmt: skip
    model.add_argument(
        "--device", type=int, default=0, metavar="N", help="CUDA device (default: %(default)s)"
    )
    model.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)"
    )
    model.add_argument("--capture-on-open", action="store_true", help="capture the CUDA graphs of an engine with "
                       "buckets when it is opened, so that no later call does")  # fmt: skip
    model.add_argument("--flavour", metavar="NAME", help="graph of the model directory that onnxruntime-cpu runs, as "
                       "cpu-int8 (default: the best exact one)")  # fmt: skip
    model.add_argument("--precision", choices=("fp32", "bf16"), help="what openvino computes in "
                       "(default: fp32; bf16 where the CPU has it)")  # fmt: skip
    model.add_argument(
        "--kernel-library",
        type=Path,
        metavar="FILE",
        help="for onnxruntime-amx: what mmvision build-plugins --cpu built (default: the one in "
        "the model directory's plugins/)",
    )
    for name, what in (("patches", "4096"), ("images", "64")):
        model.add_argument(f"--max-{name}", type=int, metavar="N", help=f"for onnxruntime-tensorrt: most {name} of a "
                           f"launch (default: {what})")  # fmt: skip
    model.add_argument("--trust", action="store_true", default=None, help="open engines and libraries of the model "
                       "directory that you have not built here: they are executable content")  # fmt: skip
    model.add_argument("--verify", choices=VERIFY, default="once", help="when the weights are hashed: the first time "
                       "you open them, always, or never (default: %(default)s)")  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("--image", type=Path, nargs="+", action="extend", metavar="FILE",
                        help="images, encoded as one batch; with a folder among them, one after the other into the "
                        "folder --output; may be repeated")  # fmt: skip
    inputs.add_argument(
        "--video", type=Path, metavar="FILE", help="a video, encoded segment by segment"
    )
    inputs.add_argument(
        "--fps", type=float, metavar="F", help="frames to sample per second of video (default: 1)"
    )
    inputs.add_argument(
        "--pixel-values",
        type=Path,
        metavar="NPY",
        help="patches [num_patches, 1176], with --grid-thw",
    )
    inputs.add_argument(
        "--grid-thw", type=Path, metavar="NPY", help="integers [num_images, 3]: t, h, w in patches"
    )
    inputs.add_argument("--resize", choices=RESIZE_RULES, help="how images get their size: area as in transformers, "
                        "long-side as in SGLang, box as of M3.1 (default: the model directory's)")  # fmt: skip
    inputs.add_argument("--max-long-side", type=int, metavar="PIXELS", help="of --resize long-side: 112 to 3584, a "
                        "multiple of 28 (default: 2016)")  # fmt: skip
    inputs.add_argument("--resize-to-fit", action="store_true", help="make what is too large for the engine as small "
                        "as it has to be, rather than refuse it")  # fmt: skip
    inputs.add_argument("--max-pixels", type=int, metavar="N", default=MAX_FILE_PIXELS, help="refuse images, and "
                        "videos with frames, of more pixels before decoding (default: %(default)s)")  # fmt: skip
    inputs.add_argument("--draft", action=argparse.BooleanOptionalAction, default=True, help="decode a JPEG much "
                        "larger than what the encoder sees at a part of its size; --no-draft is exact")  # fmt: skip
    outputs = parser.add_argument_group("output")
    outputs.add_argument("--output", type=Path, metavar="FILE|DIR", help="write image embeddings [tokens, text_hidden] "
                         "here: .npy, .safetensors or .jsonl; of a folder, a folder")  # fmt: skip
    outputs.add_argument(
        "--format", choices=FORMATS, help="of the files in a folder (default: npy)"
    )
    outputs.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _checked_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    given = [
        name for name in ("image", "video", "pixel_values") if getattr(arguments, name) is not None
    ]
    if len(given) > 1 or (arguments.pixel_values is None) != (arguments.grid_thw is None):
        parser.error("give --image, or --video, or --pixel-values with --grid-thw")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.max_pixels < 1:
        parser.error(f"--max-pixels must be at least 1, got {arguments.max_pixels}")
    if arguments.fps is not None and arguments.video is None:
        parser.error("--fps goes with --video")
    sizing = (arguments.resize_to_fit, arguments.resize, arguments.max_long_side)
    if any(sizing) and arguments.pixel_values is not None:
        parser.error(
            "--resize, --max-long-side and --resize-to-fit go with --image or --video: patches "
            "cannot be resized"
        )
    arguments.folder = any(path.is_dir() for path in arguments.image or ())
    if arguments.folder and (
        arguments.output is None or arguments.output.suffix.removeprefix(".") in FORMATS
    ):
        parser.error(
            "a folder of images needs --output, a folder for their embeddings; --format says in "
            "which files"
        )
    if arguments.format is not None and not arguments.folder:
        parser.error("--format goes with a folder of images")
    return arguments


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
    arguments = _checked_arguments(argv, prog)
    work = _print_folder if arguments.folder else _print_summary
    return exit_code_of(lambda: work(arguments), verbose=arguments.verbose)


def _print_summary(arguments: argparse.Namespace) -> int:
    print(json.dumps(_run(arguments), indent=2), flush=True)
    return 0


def _opened(arguments: argparse.Namespace) -> VisionEncoder:
    return VisionEncoder.open(
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
        trust=arguments.trust,
        verify=arguments.verify,
        progress=ProgressLine(),
    )


def _decoder(arguments: argparse.Namespace, encoder: VisionEncoder) -> ImageDecoder:
    preprocessor = encoder.preprocessor_for(resize_to_fit=arguments.resize_to_fit)
    return ImageDecoder(preprocessor, max_pixels=arguments.max_pixels, draft=arguments.draft)


def _print_folder(arguments: argparse.Namespace) -> int:
    counts = dict.fromkeys(STATUSES, 0)
    # Before a model is opened: that takes a while, and this may refuse.
    listed = files_below(arguments.image)
    with _opened(arguments) as encoder:
        identity = run_identity(
            encoder, resize_to_fit=arguments.resize_to_fit, draft=arguments.draft
        )
        refuse_foreign_output(arguments.output, arguments.image, identity, force=arguments.force)
        for report in encode_folder(
            encoder,
            _decoder(arguments, encoder),
            listed,
            arguments.output,
            arguments.format or "npy",
            force=arguments.force,
        ):
            counts[report["status"]] += 1
            print(json.dumps(report), flush=True)
            if "error" in report:
                print_error(report["error"])
        print(
            json.dumps({**encoder.info, "output": str(arguments.output), "files": counts}),
            flush=True,
        )
    if not sum(counts.values()):
        raise InputError(f"no files in {', '.join(map(str, arguments.image))}")
    return 1 if counts["failed"] else 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    output: Path | None = arguments.output
    if output is not None:
        refuse_unknown_format(output)
        if output.exists() and not arguments.force:
            raise OutputError(
                f"{output} already exists",
                hint="choose another --output, or replace it with --force",
            )
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
    return {**encoder.info, **summary, "output": None if output is None else str(output)}


def _encode_batch(
    arguments: argparse.Namespace, encoder: VisionEncoder, file: EmbedsFile | None
) -> dict[str, Any]:
    start = time.perf_counter()
    inputs, batch = _inputs(arguments, encoder)
    prepared = time.perf_counter()
    _say_memory(encoder, batch)
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
        progress=ProgressLine(),
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
        "milliseconds": {"decode and encode": round((time.perf_counter() - start) * 1e3, 3)},
    }


def _inputs(arguments: argparse.Namespace, encoder: VisionEncoder) -> tuple[list[str], PackedBatch]:
    if arguments.pixel_values is not None:
        paths = (arguments.pixel_values, arguments.grid_thw)
        pixel_values, grid_thw = (array_from_file(path) for path in paths)
        batch = checked_batch(pixel_values, grid_thw, encoder.config, encoder.dtype)
        return [str(path) for path in paths], batch
    if arguments.image:
        batch = _decoder(arguments, encoder).batch(arguments.image, dtype=encoder.dtype)
        return [str(path) for path in arguments.image], batch
    preprocessor = encoder.preprocessor_for(resize_to_fit=arguments.resize_to_fit)
    return [_TEST_PATTERN], batch_from_images([_test_pattern()], preprocessor)


def _test_pattern() -> Image.Image:
    row = np.linspace(0, 255, 448, dtype=np.uint8)
    red, green = np.meshgrid(row, row)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


if __name__ == "__main__":
    sys.exit(main())
