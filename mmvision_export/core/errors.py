"""Errors a user can act on: one subclass per stage, each with an optional next step.

The command line turns any `MmvisionError` into one `error:` line and, where there is a `hint`, one
`hint:` line. The wording is always *what was wrong, the rule, the value*; the hint is *what to do*.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

__all__ = [
    "BackendError",
    "BenchmarkError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "InputError",
    "ManifestError",
    "MmvisionError",
    "NotFiniteError",
    "OutputError",
    "ParityError",
    "PluginError",
    "QuantizationError",
    "Reason",
    "message_and_hint",
    "print_error",
    "printable",
]


_HINT = "\nhint: "

Reason = Literal["missing", "exists", "unreadable", "malformed", "unsafe", "no space"]
"""Why a file or folder was refused, where nothing but the words of the message tells."""


class MmvisionError(Exception):
    """Base of every error this package raises on purpose.

    `str(error)` is the message and, on a line of its own, the hint.

    Args:
        message: What was wrong, the rule and the value, in one line (lists of names may follow on
            further lines). Of another error's text, its hint is taken too where none is given.
        hint: What to do next, or None.
        reason: For programs, which do not read the message: why a file or folder was refused, or
            None.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, reason: Reason | None = None
    ) -> None:
        # An error that quotes another has the other's text in its own, and says the hint once.
        self.message, _, quoted = message.partition(_HINT)
        self.hint = hint or quoted or None
        self.reason = reason
        super().__init__(self.message)

    def __str__(self) -> str:
        """The message and the hint."""
        return f"{self.message}{_HINT}{self.hint}" if self.hint else self.message


class ConfigError(MmvisionError):
    """A configuration field is missing, malformed, contradictory or not implemented."""


class CheckpointError(MmvisionError):
    """A checkpoint cannot be found or read, or has not exactly the encoder's tensors."""


class ExportError(MmvisionError):
    """The encoder could not be turned into an ONNX graph, or the graph failed its checks."""


class ParityError(MmvisionError):
    """A comparison could not be run, or a difference is beyond its gate."""


class PluginError(MmvisionError):
    """A plugin's kernel could not be compiled."""


class QuantizationError(MmvisionError):
    """A model cannot be quantised, or not within its accuracy gate."""


class EngineError(MmvisionError):
    """An engine could not be built."""


class BackendError(MmvisionError):
    """An inference backend is not installed, not usable here, or failed while running."""


class BenchmarkError(MmvisionError):
    """A side of a comparison could not be started, failed, or computes something else."""


class InputError(MmvisionError):
    """Images, patches or `grid_thw` that the encoder cannot take."""


class NotFiniteError(InputError):
    """Embeddings of some images hold a NaN or an infinity. Those of the others are here.

    Args:
        message: See `MmvisionError`.
        images: Numbers of the images that are not finite, in the batch's order.
        image_embeds: For each image of the batch its `[tokens, text_hidden_size]` array, or None
            where it is not finite.
        hint: See `MmvisionError`.
    """

    def __init__(
        self,
        message: str,
        *,
        images: Sequence[int],
        image_embeds: Sequence[Any],
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.images = list(images)
        self.image_embeds = list(image_embeds)


class ManifestError(MmvisionError):
    """A model directory, manifest or sidecar is missing, malformed or not of its files."""


class OutputError(MmvisionError):
    """An output path exists, cannot be written, or ran out of space."""


def message_and_hint(error: Exception) -> tuple[str, str | None]:
    """What to tell a user about an error.

    Its own words, the system's, or the first line of one that was not foreseen.
    """
    if isinstance(error, MmvisionError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.strerror:
        # A file without permission, a full disk: the system's own words say what it is.
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}", None
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"{type(error).__name__}: {reason}",
        "this was not foreseen; --verbose shows where it happened",
    )


def printable(text: str) -> str:
    """A text with each control character written out, but for line ends and tabs.

    Names of files and strings of a manifest come from anybody. A terminal obeys some of their
    characters, and a stream refuses bytes of a name that are no UTF-8.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else ascii(character)[1:-1]
        for character in text
    )


def print_error(message: str, hint: str | None = None) -> None:
    """One `error:` line and, where there is a next step, one `hint:` line, on standard error."""
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
