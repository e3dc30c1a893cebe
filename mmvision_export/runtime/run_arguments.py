"""What `mmvision run` takes on its command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmvision_export.artifacts.build_options import bytes_from_size
from mmvision_export.core.errors import EngineError, print_error
from mmvision_export.core.verified_files import VERIFY
from mmvision_export.models.minimax_m3_vl.images import MAX_FILE_PIXELS
from mmvision_export.models.minimax_m3_vl.resize import RESIZE_RULES
from mmvision_export.runtime.backends import BACKENDS
from mmvision_export.runtime.backends.backend import WeightBudget
from mmvision_export.runtime.embeds_file import FORMATS
from mmvision_export.runtime.given_images import STANDARD_INPUT, expanded
from mmvision_export.version import __version__

__all__ = ["arguments_of_run"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version. argparse's own method swallows the error of a full disk."""
        print(message, end="", file=file or sys.stderr, flush=True)

    def error(self, message: str) -> NoReturn:
        print_error(message, f"{self.prog} --help")
        self.exit(2)


def _weight_budget(text: str) -> WeightBudget:
    if text == "auto":
        return "auto"
    try:
        return 0 if text == "0" else bytes_from_size(text)
    except EngineError as error:
        raise argparse.ArgumentTypeError(f"{error.message}; {error.hint}") from None


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,  # as the other commands: a script that says --imag breaks with the next option
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Encode images or a video with the vision encoder. With no input, encode a test "
        "pattern,\nto see that everything works.",
        epilog=f"""examples:
  {prog} --image photo.jpg scan.png --output embeds.safetensors
  {prog} --image photos/ --output embeds/
  {prog} --video clip.mp4 --fps 2 --output clip.jsonl

exit codes: 0; 1 after an error, or if an image of a folder failed; 2 after wrong usage; 130 after
Ctrl-C; 141 if nobody reads the output; 143 after SIGTERM""",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="model directory, or an .engine file (default: the "
                       "only one under engines/)")  # fmt: skip
    model.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="runtime (default: %(default)s, "
                       "the fastest one that works here)")  # fmt: skip
    model.add_argument(
        "--device", type=int, default=0, metavar="N", help="CUDA device (default: %(default)s)"
    )
    model.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)"
    )
    model.add_argument("--capture-on-open", action="store_true", help="capture the CUDA graphs of an engine's "
                       "buckets on opening, so that no later call captures one")  # fmt: skip
    model.add_argument("--flavour", metavar="NAME", help="graph of the model directory that onnxruntime-cpu runs, as "
                       "cpu-int8 (default: the best exact one)")  # fmt: skip
    model.add_argument("--precision", choices=("fp32", "bf16"), help="type that openvino computes "
                       "in (default: fp32; a CPU without bfloat16 refuses bf16)")  # fmt: skip
    model.add_argument(
        "--kernel-library",
        type=Path,
        metavar="FILE",
        help="library for onnxruntime-amx, built by mmvision build-plugins --cpu (default: the one "
        "in the model directory's plugins/)",
    )
    for name, what in (("patches", "4096"), ("images", "64")):
        model.add_argument(f"--max-{name}", type=int, metavar="N", help=f"for onnxruntime-tensorrt: most {name} of a "
                           f"launch (default: {what})")  # fmt: skip
    model.add_argument("--weight-budget", type=_weight_budget, metavar="SIZE|auto", help="of an engine built with "
                       "--weight-streaming: most device memory for its weights, as 500M (default: all)")  # fmt: skip
    model.add_argument("--trust", action="store_true", default=None, help="also open engines and libraries "
                       "of the model directory that you have not built here; they are executable content")  # fmt: skip
    model.add_argument("--verify", choices=VERIFY, default="once", help="when the weights are hashed: the first time "
                       "you open them, always, or never (default: %(default)s)")  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("--image", type=Path, nargs="+", action="extend", metavar="FILE",
                        help="images, encoded as one batch; - reads one from standard input; a quoted pattern "
                        "as 'a*.jpg' takes the files that match; if one is a folder, each file is encoded by itself, "
                        "into the folder --output")  # fmt: skip
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
    inputs.add_argument("--resize", choices=RESIZE_RULES, help="how large an image becomes: area as in transformers, "
                        "long-side as in SGLang, box as in M3.1 (default: the model directory's)")  # fmt: skip
    inputs.add_argument("--max-long-side", type=int, metavar="PIXELS", help="with --resize long-side: 112 to 3584, a "
                        "multiple of 28 (default: 2016)")  # fmt: skip
    inputs.add_argument("--resize-to-fit", action="store_true", help="shrink an image that is too large for the "
                        "engine, rather than refuse it")  # fmt: skip
    inputs.add_argument("--max-pixels", type=int, metavar="N", default=MAX_FILE_PIXELS, help="refuse images and "
                        "video frames of more pixels, before decoding (default: %(default)s)")  # fmt: skip
    inputs.add_argument("--draft", action=argparse.BooleanOptionalAction, default=True, help="decode a JPEG at a part "
                        "of its size if it is much larger than the encoder's; --no-draft is exact")  # fmt: skip
    outputs = parser.add_argument_group("output")
    outputs.add_argument("--output", type=Path, metavar="FILE|DIR", help="write image embeddings [tokens, text_hidden] "
                         "here: a .npy, .safetensors or .jsonl file; for a folder of images, a folder")  # fmt: skip
    outputs.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the files in the folder --output (default: npy)",
    )
    outputs.add_argument("--force", action="store_true", help="replace an output that exists")
    outputs.add_argument("--json", action="store_true", help="print JSON, also on a terminal")
    outputs.add_argument("--quiet", action="store_true", help="print no progress and no notes")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error, and why other "
                        "backends were passed over")  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def arguments_of_run(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Read and check the arguments.

    Args:
        argv: Without the program's name, `sys.argv` if None.
        prog: What its help calls it.

    Returns:
        As they were given; `image` with patterns expanded, and `folder`: whether there is one.

    Raises:
        SystemExit: With 2, after wrong usage; with 0, after `--help` or `--version`.
        OSError: Help or the version cannot be written.
    """
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
    if arguments.image is not None:
        arguments.image = list(expanded(arguments.image))
        if not arguments.image:
            parser.error("no file matches --image")
        if arguments.image.count(STANDARD_INPUT) > 1:
            parser.error("--image takes one - only: standard input is one image")
    arguments.folder = any(path.is_dir() for path in arguments.image or ())
    if arguments.folder and arguments.image and STANDARD_INPUT in arguments.image:
        parser.error("--image takes - or folders, not both")
    if arguments.folder and (
        arguments.output is None or arguments.output.suffix.removeprefix(".") in FORMATS
    ):
        parser.error(
            "a folder of images needs --output, a folder for the embeddings; --format chooses the files in it"
        )
    if arguments.format is not None and not arguments.folder:
        parser.error("--format goes with a folder of images")
    return arguments
