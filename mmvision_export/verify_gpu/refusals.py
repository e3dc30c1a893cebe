"""What must be refused on a GPU: an image beyond the engine, and an engine that was changed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmvision_export.artifacts.engine_record import sidecar_path
from mmvision_export.core.errors import InputError, ManifestError, MmvisionError
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, Opener, open_engine, random_batch
from mmvision_export.verify_gpu.findings import Findings

__all__ = ["check_refusals"]

_PART = "refusals"


def check_refusals(
    engines: Sequence[BuiltEngine],
    findings: Findings,
    budget: Budget,
    *,
    folder: Path,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Ask each engine for what it must refuse.

    Args:
        engines: The engines.
        findings: Where to put what is found.
        budget: When to stop.
        folder: An existing folder for a damaged copy of an engine.
        options: How engines are opened.
        opener: Opens them.
    """
    for engine in engines:
        if not budget.allows(_PART, engine.name, findings):
            continue
        case = f"{engine.name}, an image beyond it"
        with (
            findings.failure_is_a_finding(_PART, case),
            contextlib.closing(opener(engine.path, options)) as backend,
        ):
            beyond = engine.largest.image_patches + backend.config.patches_per_token
            _, batch = random_batch(backend, [beyond], seed=0)
            _expect(findings, case, InputError, backend.run, batch)
        case = f"{engine.name}, one byte more"
        with findings.failure_is_a_finding(_PART, case):
            damaged = _with_one_byte_more(engine.path, folder)
            try:
                _expect(findings, case, ManifestError, _open_and_close, opener, damaged, options)
            finally:
                damaged.unlink()


def _open_and_close(opener: Opener, engine: Path, options: BackendOptions) -> None:
    opener(engine, options).close()


def _expect(
    findings: Findings,
    case: str,
    kind: type[MmvisionError],
    work: Callable[..., object],
    *arguments: Any,
) -> None:
    try:
        work(*arguments)
    except kind as error:
        findings.judge(_PART, case, [], {}, f"refused: {getattr(error, 'message', error)}")
    else:
        findings.judge(_PART, case, ["it was not refused"], {})


def _with_one_byte_more(engine: Path, folder: Path) -> Path:
    copy = folder / engine.name
    shutil.copyfile(engine, copy)
    shutil.copyfile(sidecar_path(engine), sidecar_path(copy))
    with copy.open("ab") as file:
        file.write(b"\n")
    return copy
