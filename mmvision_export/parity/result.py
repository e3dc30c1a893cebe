"""What a comparison found, and its summary in the manifest."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.artifacts.verdicts import Verdict, content_sha256
from mmvision_export.core.metrics import Metrics
from mmvision_export.parity.layers import LayerComparison
from mmvision_export.parity.samples import Sample

__all__ = ["REFERENCE", "ParityResult", "ParityRow", "record_parity"]

REFERENCE = "pytorch-fp64"
"""What everything is compared with."""


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One result on one sample.

    Attributes:
        runner: What was compared with PyTorch in float64, and how it was run.
        subject: The graph or engine; None for PyTorch itself, which has no failures.
        precision: Key of the gate table.
        sample: Name of the sample.
        patches: Patches in the batch.
        metrics: The distance.
        limit: Largest relative L2 difference that the gate allows here, or None.
        failures: Gates it did not pass.
        token_errors: Relative L2 difference of each image token, `[num_image_tokens]`.
    """

    runner: str
    subject: str | None
    precision: str
    sample: str
    patches: int
    metrics: Metrics
    limit: float | None
    failures: list[str]
    token_errors: npt.NDArray[np.float64] = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the tokens left out."""
        fields = {name: value for name, value in vars(self).items() if name != "token_errors"}
        return {**fields, "metrics": self.metrics.to_dict()}


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """All there is to say about a model directory's accuracy.

    Attributes:
        directory: The model directory.
        manifest: Its manifest.
        samples: What was compared on.
        rows: Result by runner and sample.
        layers: The graphs stage by stage, on the sample where a graph is furthest off.
        warnings: What passes and yet should be known.
    """

    directory: Path
    manifest: Manifest
    samples: list[Sample]
    rows: list[ParityRow]
    layers: LayerComparison
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether no row failed a gate."""
        return not any(row.failures for row in self.rows)


def record_parity(result: ParityResult) -> Manifest:
    """Write a summary of a result into the manifest, under the name of each graph or engine.

    A failure on another sample stands until that sample passes, or the graph is another one.

    Returns:
        The manifest as it now is.

    Raises:
        ManifestError: The manifest is missing or malformed.
        OutputError: It cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    parity: dict[str, Any] = {}
    for subject in dict.fromkeys(row.subject for row in result.rows if row.subject is not None):
        rows = [row for row in result.rows if row.subject == subject]
        parity[subject] = {
            "reference": REFERENCE,
            "date": now,
            "content_sha256": content_sha256(subject, result.manifest.files),
            "verdicts": [dataclasses.asdict(_verdict(row, result.samples, now)) for row in rows],
            "grids": _summary([row for row in rows if row.runner == subject]),
            "rounded": _summary([row for row in rows if row.runner == f"{subject} (rounded)"]),
            **_other_runtimes(rows, subject),
            "layers": result.layers.summary(subject),
        }
    # A copy: the result keeps the manifest of what was compared.
    updated = dataclasses.replace(result.manifest)
    updated.update(result.directory, parity=parity)
    return updated


def _verdict(row: ParityRow, samples: Sequence[Sample], now: str) -> Verdict:
    (sample,) = (each for each in samples if each.name == row.sample)
    metrics = row.metrics.to_dict()
    return Verdict(
        runner=row.runner,
        sample=sample.describe(),
        sample_sha256=sample.sha256,
        date=now,
        failures=row.failures,
        relative_l2=metrics["relative_l2"],
        min_cosine=metrics["min_cosine"],
    )


def _other_runtimes(rows: Sequence[ParityRow], subject: str) -> dict[str, Any]:
    """Of runtimes that a graph was run in besides ONNX Runtime, by name, where there are any."""
    said = (subject, f"{subject} (rounded)")
    names = dict.fromkeys(row.runner for row in rows if row.runner not in said)
    found = {name: _summary([row for row in rows if row.runner == name]) for name in names}
    return {"other_runtimes": found} if found else {}


def _summary(rows: Sequence[ParityRow]) -> dict[str, Any]:
    return {
        row.sample: {**row.metrics.to_dict(), "patches": row.patches, "failures": row.failures}
        for row in rows
    }
