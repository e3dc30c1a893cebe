"""The `mmvision inspect` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console
from mmvision_export.cli.options import AsJson, Verbose, print_json
from mmvision_export.core.errors import printable

__all__ = ["inspect"]


@examples(
    "mmvision inspect engines/MiniMax-M3",
    "mmvision inspect model.onnx --json",
    "mmvision inspect --layers engines/MiniMax-M3/plans/NAME.engine",
)
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="Model directory, .onnx graph or .engine.")
    ],
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Of an engine: its layers by kind and type, from the report beside it."
        ),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Describe a model directory, graph or engine.

    The command prints inputs, operators, sizes, precision, versions and what was checked: a table on a
    terminal, JSON with --json or into a file or a pipe. It hashes every file of a model directory and
    compares the hashes with the manifest.
    """
    from mmvision_export.graph.inspection import inspect as describe
    from mmvision_export.graph.inspection import inspect_layers

    described = inspect_layers(path) if layers else describe(path)
    if layers and not as_json and sys.stdout.isatty():
        console.print(_layer_table(described))
        return
    if as_json or not sys.stdout.isatty():
        print_json(described)
        return
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(described):
        table.add_row(escape(printable(name)), escape(printable(value)))
    console.print(table)


def _layer_table(described: Mapping[str, Any]) -> Table:
    """Layers of each kind, by the type that they read."""
    types = list(dict.fromkeys(each for row in described["precisions"].values() for each in row))
    table = Table(
        box=None,
        title=f"{described['count']} layers, {described['fused_attention']} of fused attention",
        caption=f"listed by the {described['source']}, in {described['report']}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("kind")
    for name in ("layers", *types):
        table.add_column(name, justify="right")
    for kind, count in described["kinds"].items():
        row = described["precisions"][kind]
        table.add_row(
            escape(printable(kind)), str(count), *(str(row.get(each, "")) for each in types)
        )
    return table


def _rows(described: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each field in words, those of an object below its name."""
    for name, value in described.items():
        title = indent + name.replace("_", " ") if indent == "" else indent + name
        if isinstance(value, Mapping) and value:
            yield title, ""
            yield from _rows(value, indent + "  ")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            for number, entry in enumerate(value, 1):
                yield f"{title} {number}", ""
                yield from _rows(entry, indent + "  ")
        else:
            yield title, _in_words(value)


def _in_words(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
