"""Write the sizes that SGLang's own code gives to 2,000 random images, for tests to compare with.

    pip download --no-deps sglang==0.5.23
    python scripts/resize_table.py sglang-*.whl tests/models/resize_table.csv

Of the wheel only two functions are run, which need nothing of its package.
"""

from __future__ import annotations

import argparse
import ast
import csv
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FACTOR = 28
_LONG_SIDES = (112, 672, 1008, 2016, 3584)
_BOXES = ((672, 672), (1008, 672), (2016, 2016))


def _function(wheel: zipfile.ZipFile, module: str, name: str) -> Callable[..., Any]:
    """One function of a module, with the constants and types it names."""
    tree = ast.parse(wheel.read(f"sglang/srt/multimodal/processors/{module}.py"))
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name == name)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    namespace: dict[str, Any] = {"Tuple": tuple}
    exec(compile(ast.Module(wanted, []), module, "exec"), namespace)  # noqa: S102 - named by the user
    function: Callable[..., Any] = namespace[name]
    return function


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    generator = random.Random(14)  # noqa: S311 - sizes
    with zipfile.ZipFile(arguments.wheel) as wheel:
        by_long_side = _function(wheel, "minimax_m3_vl", "_compute_aligned_size")
        in_box = _function(wheel, "minimax_m31_media", "_resize_shape")
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["height", "width", "bound", "new_height", "new_width"])
        for index in range(2000):
            # Half of them near the sizes at which a rule changes its mind.
            height, width = (
                round(2 ** generator.uniform(3, 13))
                if generator.random() < 0.5
                else generator.choice((28, 112, 672, 1008, 2016, 3584)) + generator.randint(-3, 3)
                for _ in range(2)
            )
            if max(height, width) > 200 * min(height, width):
                height = width
            if index % 2:
                bound: Any = generator.choice(_LONG_SIDES)
                size = by_long_side(height, width, _FACTOR, bound)
            else:
                box = generator.choice(_BOXES)
                bound, size = f"{box[0]}x{box[1]}", in_box(height, width, box, _FACTOR)
            rows.writerow([height, width, bound, *size])


if __name__ == "__main__":
    main()
