"""`python -m mmvision_export.run`: images, or patches with their grid, to image embeddings.

Prints one JSON object on standard output. Needs numpy, pillow and one backend, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export import __version__
from mmvision_export.backends import BACKENDS
from mmvision_export.errors import InputError, OutputError, message_and_hint, print_error
from mmvision_export.grid import tokens_per_image
from mmvision_export.manifest import find_model_directory
from mmvision_export.output import new_files
from mmvision_export.preprocess import image_from_file, patches_from_images
from mmvision_export.runtime import VisionEncoder

__all__ = ["main"]

_TEST_PATTERN = "test pattern, 448 x 448"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmvision_export.run",
        description="Encode images with the vision encoder and print a summary as JSON. With no input, encodes a test "
        "pattern, to see that everything works.",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory, or an .engine file (default: the "
                        "only one under engines/)")  # fmt: skip
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="runtime (default: %(default)s, "
                        "the fastest that works here)")  # fmt: skip
    parser.add_argument("--flavour", metavar="NAME", help="graph of the model directory that onnxruntime-cpu runs, as "
                        "cpu-int8 (default: model.onnx)")  # fmt: skip
    parser.add_argument("--device", type=int, default=0, metavar="N", help="CUDA device (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)")
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE", help="images, encoded in one packed batch")
    parser.add_argument("--pixel-values", type=Path, metavar="NPY", help="patches [num_patches, 1176], with --grid-thw")
    parser.add_argument("--grid-thw", type=Path, metavar="NPY", help="integers [num_images, 3]: t, h, w in patches")
    parser.add_argument("--output", type=Path, metavar="NPY", help="write image embeddings [tokens, text_hidden] here")
    parser.add_argument("--force", action="store_true", help="replace --output if it exists")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, or 1 after an error. Wrong usage exits with 2 by itself, Ctrl-C gives 130.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.pixel_values is None) != (arguments.grid_thw is None):
        parser.error("--pixel-values and --grid-thw go together")
    if arguments.image and arguments.pixel_values:
        parser.error("give either --image or --pixel-values with --grid-thw")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(json.dumps(_run(arguments), indent=2), flush=True)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except Exception as error:
        if arguments.verbose:
            raise
        print_error(*message_and_hint(error))
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    output: Path | None = arguments.output
    if output is not None:
        if output.suffix != ".npy":
            raise OutputError(f"--output must end in .npy, got {output}")
        if output.exists() and not arguments.force:
            raise OutputError(f"{output} already exists", hint="choose another --output, or replace it with --force")
    model = find_model_directory(arguments.model)
    with contextlib.ExitStack() as stack:
        # Before the work rather than after it: what cannot be written is an error now.
        new = None if output is None else stack.enter_context(new_files(output.parent, name=output.name))
        summary, image_embeds = _encode(arguments, model)
        if output is not None and new is not None:
            np.save(new / output.name, image_embeds)
    return {**summary, "output": None if output is None else str(output)}


def _encode(arguments: argparse.Namespace, model: Path) -> tuple[dict[str, Any], npt.NDArray[np.floating]]:
    start = time.perf_counter()
    with VisionEncoder.open(
        model,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        flavour=arguments.flavour,
    ) as encoder:
        opened = time.perf_counter()
        inputs, pixel_values, grid_thw = _inputs(arguments, encoder)
        prepared = time.perf_counter()
        image_embeds = encoder(pixel_values, grid_thw)
        encoded = time.perf_counter()
        summary: dict[str, Any] = {
            **encoder.info,
            "inputs": inputs,
            "pixel_values": list(pixel_values.shape),
            "grid_thw": grid_thw.tolist(),
            "image_embeds": list(image_embeds.shape),
            "dtype": str(image_embeds.dtype),
            "tokens_per_image": tokens_per_image(grid_thw, encoder.config).tolist(),
            "milliseconds": {
                "open": round((opened - start) * 1e3, 3),
                "preprocess": round((prepared - opened) * 1e3, 3),
                "encode": round((encoded - prepared) * 1e3, 3),
            },
        }
    if not np.isfinite(image_embeds).all():
        raise InputError("the embeddings are not finite", hint="check the model with: mmvision parity")
    return summary, image_embeds


def _inputs(
    arguments: argparse.Namespace, encoder: VisionEncoder
) -> tuple[list[str], npt.NDArray[np.floating], npt.NDArray[np.int64]]:
    if arguments.pixel_values is not None:
        paths = (arguments.pixel_values, arguments.grid_thw)
        pixel_values, grid_thw = (_array_from_file(path) for path in paths)
        return [str(path) for path in paths], pixel_values, grid_thw
    if arguments.image:
        images = [image_from_file(path) for path in arguments.image]
        names = [str(path) for path in arguments.image]
        return names, *patches_from_images(images, encoder.preprocessor, names=names)
    return [_TEST_PATTERN], *patches_from_images([_test_pattern()], encoder.preprocessor)


def _array_from_file(path: Path) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # NumPy's header parser raises whatever Python's tokenizer and zipfile do
        raise InputError(f"{path}: not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected one array in a .npy file, got an archive")
    return array


def _test_pattern() -> Image.Image:
    row = np.linspace(0, 255, 448, dtype=np.uint8)
    red, green = np.meshgrid(row, row)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


if __name__ == "__main__":
    sys.exit(main())
