"""What a run prints: a few lines for a person, JSON for a program."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mmvision_export.core.errors import printable
from mmvision_export.runtime.folder import STATUSES

__all__ = ["engines_passed_over", "in_words", "printed_facts", "wants_json"]

_NO_ENGINE = "no engine fits"


def wants_json(asked: bool) -> bool:
    """Whether to print JSON: it was asked for, or standard output is no terminal."""
    return asked or not sys.stdout.isatty()


def printed_facts(info: Mapping[str, Any], *, verbose: bool) -> dict[str, Any]:
    """An encoder's facts; why `auto` passed over other backends is said with `verbose` only."""
    return {name: value for name, value in info.items() if verbose or name != "passed_over"}


def engines_passed_over(info: Mapping[str, Any]) -> list[str]:
    """Why engines that are there do not run: nobody wants a CPU to do their work unnoticed."""
    reasons: Mapping[str, str] = info.get("passed_over") or {}
    return [
        f"{name}: {reason}" for name, reason in reasons.items() if reason.startswith(_NO_ENGINE)
    ]


def in_words(result: Mapping[str, Any]) -> str:
    """The summary of a run in a few lines.

    Args:
        result: What the command prints as JSON: of one batch or video, or the last line of a folder.
    """
    lines = []
    for name, row, tokens in _images(result):
        lines.append(f"{name}: grid {' x '.join(map(str, row))}, {tokens} image tokens")
    for segment in result.get("segments", ()):
        first, last = segment["timestamps"][0], segment["timestamps"][-1]
        lines.append(f"{first:.2f} s to {last:.2f} s: {segment['tokens']} image tokens")
    if "files" in result:
        counts = ", ".join(
            f"{result['files'][status]} {status.replace('_', ' ')}"
            for status in STATUSES
            if result["files"][status]
        )
        lines.append(f"files: {counts or 'none'}")
    if "image_embeds" in result:
        tokens, width = result["image_embeds"]
        lines.append(f"image_embeds: {tokens} x {width} {result['dtype']}")
    runs = [
        str(result[name])
        for name in ("backend", "precision", "graph", "engine")
        if result.get(name)
    ]
    lines.append(f"ran: {', '.join(runs)}; {result['resize']}")
    if "milliseconds" in result:
        stages = ", ".join(
            f"{name.replace('_', ' ')} {milliseconds / 1e3:.2f} s"
            for name, milliseconds in result["milliseconds"].items()
        )
        lines.append(f"time: {stages}")
    lines.append(
        f"written: {result['output']}"
        if result.get("output")
        else "written: nothing; give --output FILE.npy, .safetensors or .jsonl"
    )
    return printable("\n".join(lines))


def _images(result: Mapping[str, Any]) -> list[tuple[str, list[int], int]]:
    rows = result.get("grid_thw", [])
    inputs = result.get("inputs", [])
    if len(inputs) != len(rows):  # patches from a file
        inputs = [f"row {number}" for number in range(len(rows))]
    return list(zip(inputs, rows, result.get("tokens_per_image", []), strict=True))
