"""The `mmvision doctor` command."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from mmvision_export.cli.command import examples
from mmvision_export.cli.console import console
from mmvision_export.cli.examination import Report, choice_for, examine
from mmvision_export.cli.options import AsJson, Verbose, print_json

__all__ = ["doctor"]


@examples("mmvision doctor", "mmvision doctor --model engines/MiniMax-M3 --json")
def doctor(
    model: Annotated[
        Optional[Path],
        typer.Option(
            "--model", metavar="DIR", help="Model directory to choose a backend for, by opening it."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show this machine and the backends that work.

    Backends come fastest first, each with the reason if it does not work. With --model, the command
    also opens the model directory and says which backend auto takes, and why it passes over others.
    It exits with 1 if no backend opens the directory.
    """
    report = examine()
    choice = None if model is None else choice_for(model)
    if as_json:
        print_json(
            {
                "kind": "doctor",
                **dataclasses.asdict(report),
                "machine": {
                    name.replace(" ", "_"): value for name, value in report.machine.items()
                },
                "missing": [
                    {"to": what, "install": command} for what, command in report.missing().items()
                ],
            }
            | ({} if choice is None else {"auto": choice})
        )
    else:
        _print(report)
        if choice is not None:
            console.print(f"\n[bold]auto, for {escape(str(model))}[/]")
            for name, reason in choice.items():
                console.print(f"  {name}: {escape(reason)}")
    if choice is not None and "none" in choice:
        sys.exit(1)


def _print(report: Report) -> None:
    console.print("[bold]machine[/]")
    facts = Table(box=None, show_header=False)
    for name, value in report.machine.items():
        facts.add_row(f" {name}", escape(value))
    console.print(facts)
    console.print("\n[bold]packages[/]")
    packages = Table(box=None, show_header=False)
    for name, version in report.packages.items():
        packages.add_row(f" {name}", version or "-", style=None if version else "dim")
    console.print(packages)
    console.print(f"\n[bold]CUDA driver[/]\n  {escape(report.driver)}")
    for row in report.backends:
        console.print(
            f"\n[bold]{row.name}[/]\n  build engines: {escape(row.builds)}\n  run: {escape(row.runs)}"
        )
    if missing := report.missing():
        console.print("\n[bold]to have more[/]")
        for what, command in missing.items():
            console.print(f"  {what}: {escape(command)}")
