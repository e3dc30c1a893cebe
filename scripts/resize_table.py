"""Write the sizes that servers' own code gives to random images, for tests to compare with.

    pip download --no-deps sglang==0.5.23
    pip download --no-deps vllm==0.33.0
    python scripts/resize_table.py sglang-*.whl vllm-*.whl tests/models/resize_table.csv

2,000 images for each server. Of the wheels only a few functions are run, which need nothing of
their packages.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import csv
import math
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_FACTOR = 28
_LONG_SIDES = (112, 672, 1008, 2016, 3584)
_BOXES = ((672, 672), (1008, 672), (2016, 2016))

_Row = tuple[str, int, int, Any, int, int]


def _functions(wheel: Path, module: str) -> dict[str, Callable[..., Any]]:
    """A module's functions that stand alone, with the constants they name."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(module))
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    namespace: dict[str, Any] = {"math": math}
    # No annotation is evaluated: they name types of packages that are not here.
    code = compile(
        ast.Module(wanted, []), module, "exec", flags=__future__.annotations.compiler_flag
    )
    exec(code, namespace)  # noqa: S102 - named by the user
    return namespace


def _size(generator: random.Random) -> tuple[int, int]:
    """Half of them near the sizes at which a rule changes its mind."""
    height, width = (
        round(2 ** generator.uniform(3, 13))
        if generator.random() < 0.5
        else generator.choice((28, 112, 672, 1008, 2016, 3584)) + generator.randint(-3, 3)
        for _ in range(2)
    )
    return (width if max(height, width) > 200 * min(height, width) else height), width


def _of_sglang(wheel: Path) -> Iterator[_Row]:
    folder = "sglang/srt/multimodal/processors"
    by_long_side = _functions(wheel, f"{folder}/minimax_m3_vl.py")["_compute_aligned_size"]
    in_box = _functions(wheel, f"{folder}/minimax_m31_media.py")["_resize_shape"]
    generator = random.Random(14)  # noqa: S311 - sizes
    for index in range(2000):
        height, width = _size(generator)
        if index % 2:
            bound: Any = generator.choice(_LONG_SIDES)
            size = by_long_side(height, width, _FACTOR, bound)
        else:
            box = generator.choice(_BOXES)
            bound, size = f"{box[0]}x{box[1]}", in_box(height, width, box, _FACTOR)
        yield "sglang", height, width, bound, *size


def _of_vllm(wheel: Path) -> Iterator[_Row]:
    smart_resize = _functions(wheel, "vllm/transformers_utils/processors/minimax_m3.py")[
        "smart_resize"
    ]
    generator = random.Random(15)  # noqa: S311 - sizes
    for index in range(2000):
        height, width = _size(generator)
        bound: Any = generator.choice(_LONG_SIDES) if index % 2 else "area"
        size = smart_resize(
            height, width, _FACTOR, max_long_side_pixel=None if bound == "area" else bound
        )
        yield "vllm", height, width, bound, *size


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sglang", type=Path)
    parser.add_argument("vllm", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["server", "height", "width", "bound", "new_height", "new_width"])
        rows.writerows(_of_sglang(arguments.sglang))
        rows.writerows(_of_vllm(arguments.vllm))


if __name__ == "__main__":
    main()
