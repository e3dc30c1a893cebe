"""Images per second from a JPEG file to patches, stage by stage, ours and transformers'.

    python -m scripts.bench_preprocess [--rounds N]

All sides work on the same files in one process and take turns; the fastest round of each is shown,
which others on the machine disturb least. transformers' processor imports
torchvision, which is not beside every torch. Its own functions are taken from its source, and its
resize from torch: the function that torchvision calls. `before` is this package's preprocessing
before it decoded drafts, decoded on several threads and wrote patches into the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch  # noqa: TID253 - its resize is one of those compared
from PIL import Image, ImageFile, ImageOps

from mmvision_export.core.ahead import worker_threads
from mmvision_export.core.processor import processor_name
from mmvision_export.models.minimax_m3_vl import image_decoder
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig, resized
from tests.support.images import from_transformers, natural

SIZES = {"12 MP": (4000, 3000), "24 MP": (6000, 4000)}
RULES = {"area": PreprocessorConfig(), "long-side": PreprocessorConfig().by("long-side")}
GAPS = (1.0, 1.5, 2.0, 3.0)
BATCH = 8

patchify = from_transformers("patchify")

Side = Callable[[list[Path], PreprocessorConfig], Any]


def before(paths: list[Path], config: PreprocessorConfig) -> np.ndarray:
    """The code of version 0.1, written down."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            images.append(turned if turned.mode == "RGB" else turned.convert("RGB"))
    pieces = []
    table, merge, side = config.normalised_levels, config.merge_size, config.patch_size
    for image in images:
        image = ImageOps.exif_transpose(image)
        height, width = resized(image.height, image.width, config)
        h, w = height // side, width // side
        patches = np.empty((1, h * w, 3, config.temporal_patch_size, side * side), np.float32)
        picture = image.resize((width, height), Image.Resampling.BICUBIC)
        levels = np.asarray(picture).reshape(h // merge, merge, side, w // merge, merge, side, 3)
        levels = levels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, side * side)
        for channel in range(3):
            patches[0, :, channel, :] = table[channel][levels[:, channel, None]]
        pieces.append(patches.reshape(h * w, -1))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def exact(paths: list[Path], config: PreprocessorConfig) -> Any:
    """Ours, at full size."""
    return ImageDecoder(config, draft=False).batch(paths).pixel_values


def draft(paths: list[Path], config: PreprocessorConfig) -> Any:
    """Ours, with drafts."""
    return ImageDecoder(config).batch(paths).pixel_values


def transformers(paths: list[Path], config: PreprocessorConfig) -> Any:
    """What transformers' fast processor does, with its own functions."""
    mean = torch.tensor(config.image_mean).view(3, 1, 1)
    std = torch.tensor(config.image_std).view(3, 1, 1)
    pieces = []
    for path in paths:
        with Image.open(path) as opened:
            levels = np.array(opened.convert("RGB"))
        tensor = torch.from_numpy(levels).permute(2, 0, 1)[None]
        size = resized(levels.shape[0], levels.shape[1], config)
        tensor = torch.nn.functional.interpolate(
            tensor, size, mode="bicubic", antialias=True, align_corners=False
        )
        normalised = (tensor.float() * config.rescale_factor - mean) / std
        pieces.append(patchify(None, normalised, 14, 2, 2)[0][0])
    return torch.cat(pieces)


SIDES: dict[str, Side] = {
    "before": before,
    "exact": exact,
    "draft": draft,
    "transformers": transformers,
}


@contextlib.contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds inside Pillow's decoding and in the resizing of either library, of one thread."""
    spent = {"decode": 0.0, "resize": 0.0}
    places: list[tuple[Any, str, str]] = [
        (ImageFile.ImageFile, "load", "decode"),
        (Image.Image, "resize", "resize"),
        (torch.nn.functional, "interpolate", "resize"),
    ]
    kept = [(holder, name, getattr(holder, name)) for holder, name, _ in places]

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[stage] += time.perf_counter() - start

        return call

    try:
        for (holder, name, stage), (_, _, function) in zip(places, kept, strict=True):
            setattr(holder, name, timed(function, stage))
        yield spent
    finally:
        for holder, name, function in kept:
            setattr(holder, name, function)


def one_image(path: Path, config: PreprocessorConfig, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each side and stage, of its fastest round, for one image."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, side in SIDES.items():
            with stages() as spent:
                start = time.perf_counter()
                side([path], config)
                total = time.perf_counter() - start
            rest = total - spent["decode"] - spent["resize"]
            seen[name].append({**spent, "patches and other": rest, "total": total})
    return {
        name: {
            stage: round(1e3 * seconds, 1)
            for stage, seconds in min(measured, key=lambda each: each["total"]).items()
        }
        for name, measured in seen.items()
    }


def images_per_second(path: Path, config: PreprocessorConfig, rounds: int) -> dict[str, float]:
    """Of each side, in its fastest round, for a batch."""
    seen: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, side in SIDES.items():
            start = time.perf_counter()
            side([path] * BATCH, config)
            seen[name].append(BATCH / (time.perf_counter() - start))
    return {name: round(max(rates), 2) for name, rates in seen.items()}


def draft_differences(path: Path, config: PreprocessorConfig) -> dict[str, Any]:
    """Levels, of 255, between a draft's picture and the exact one, for several gaps."""
    full = np.asarray(ImageDecoder(config, draft=False).picture(path)).astype(int)
    kept, result = image_decoder.DRAFT_GAP, {}
    try:
        for gap in GAPS:
            image_decoder.DRAFT_GAP = gap  # type: ignore[assignment]
            difference = np.abs(np.asarray(ImageDecoder(config).picture(path)) - full)
            mean, worst = round(float(difference.mean()), 3), int(difference.max())
            result[str(gap)] = {"mean": mean, "worst": worst}
    finally:
        image_decoder.DRAFT_GAP = kept
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps({
        "cpu": processor_name(), "threads": worker_threads(), "date": time.strftime("%Y-%m-%d"),
        "pillow": PIL.__version__, "numpy": np.__version__, "torch": torch.__version__,
        "torchvision": importlib.util.find_spec("torchvision") is not None,
    }), flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for size_name, size in SIZES.items():
            path = Path(folder, f"{size_name}.jpg")
            natural(*size).save(path, quality=92)
            for rule, config in RULES.items():
                result = {
                    "image": f"{size[0]} x {size[1]}, {path.stat().st_size / 1e6:.1f} MB",
                    "rule": rule,
                    "patches": int(np.prod(resized(size[1], size[0], config))) // 14**2,
                    "milliseconds of one image": one_image(path, config, arguments.rounds),
                    f"images/s, batch of {BATCH}": images_per_second(
                        path, config, max(1, arguments.rounds * 2 // 3)
                    ),
                    "levels of a draft, by gap": draft_differences(path, config),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
