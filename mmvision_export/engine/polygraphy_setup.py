"""Polygraphy, set up for this package: which TensorRT it drives, and where its messages go.

Polygraphy chooses between TensorRT and TensorRT-RTX once, when its TensorRT backend is first
imported, and prints to standard output, where this package's commands print JSON.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from mmvision_export.core.errors import EngineError

__all__ = ["captured_messages", "messages_that_begin", "use_tensorrt"]


def use_tensorrt(backend: str) -> None:
    """Let Polygraphy drive `tensorrt` or `tensorrt-rtx` from now on.

    Raises:
        EngineError: It already drives the other one in this process.
    """
    from polygraphy import config

    wants_rtx = backend == "tensorrt-rtx"
    if wants_rtx == config.USE_TENSORRT_RTX:
        return
    if "polygraphy.backend.trt" in sys.modules:
        raise EngineError("one process can build for either TensorRT or TensorRT-RTX, not for both")
    config.USE_TENSORRT_RTX = wants_rtx


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(level=logging.ERROR)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage().removeprefix("[E] ").removeprefix("[!] ").strip())


@contextlib.contextmanager
def captured_messages() -> Iterator[list[str]]:
    """Collect what Polygraphy, and TensorRT through it, report as errors; the rest is dropped."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []
    handler = _Collector(messages)
    logger = logging.getLogger("Polygraphy")
    before = (G_LOGGER.use_python_logging_system, logger.propagate)
    logger.addHandler(handler)
    logger.propagate = False
    G_LOGGER.use_python_logging_system = True
    try:
        yield messages
    finally:
        G_LOGGER.use_python_logging_system, logger.propagate = before
        logger.removeHandler(handler)


class _Filter(logging.Handler):
    def __init__(self, beginning: str, messages: list[str]) -> None:
        super().__init__(level=1)
        self._beginning = beginning
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        # Polygraphy puts a letter in front, and indents all lines but the first.
        text = record.getMessage().partition("] ")[2]
        if text.startswith(self._beginning):
            self._messages.append("\n".join(line.strip() for line in text.splitlines()))


@contextlib.contextmanager
def messages_that_begin(beginning: str) -> Iterator[list[str]]:
    """Collect messages of any severity that begin so; inside `captured_messages`, so that no others are shown."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []
    handler = _Filter(beginning, messages)
    logger = logging.getLogger("Polygraphy")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(1)
    try:
        with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
            yield messages
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
