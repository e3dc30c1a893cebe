"""Verdicts on a graph or engine: they add up, and a failure stands until the same sample passes.

An easier photograph says nothing about the one that failed. So the manifest keeps, for each graph and
engine, the last verdict of each runner on each sample. What was measured on other bytes is forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mmvision_export.artifacts.graph_variants import data_of
from mmvision_export.core.files import FileRecord

__all__ = [
    "Verdict",
    "content_sha256",
    "entry_with_history",
    "failed_comparison",
    "is_compared",
    "standing_failures",
    "verdicts_of",
]

_GRAPH = "model.onnx"  # whose weights all graphs share
_KEPT_PASSES = 40


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one comparison found on one sample.

    Attributes:
        runner: What was compared, and how it was run.
        sample: Its name for people, with the names of files where it is of files.
        sample_sha256: Of its patches and grid: the same sample has the same.
        date: When, in UTC, ISO 8601.
        failures: The gates it did not pass.
        relative_l2: Distance from the reference; None if it is not finite.
        min_cosine: Smallest cosine of a token; None if it is not finite.
    """

    runner: str
    sample: str
    sample_sha256: str
    date: str
    failures: Sequence[str]
    relative_l2: float | None
    min_cosine: float | None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Verdict:
        """The inverse of `dataclasses.asdict`; fields of later versions are left out."""
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return not self.failures

    def describe(self) -> str:
        """For people: sample, date and failures."""
        return f"{self.runner} on {self.sample}, {self.date[:10]}: {'; '.join(self.failures) or 'passed'}"


def entry_with_history(before: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's entry for a graph or engine, with the verdicts of earlier comparisons.

    Args:
        before: The entry that is there, or None. One of an earlier version has no verdicts.
        entry: The new one, with `content_sha256` of what was compared and its own `verdicts`. One
            without them replaces what is there.

    Returns:
        The new entry; `passed` is whether the last verdict of each runner on each sample is a pass.
    """
    if "verdicts" not in entry:
        return dict(entry)
    earlier: list[Verdict] = []
    if isinstance(before, Mapping) and before.get("content_sha256") == entry["content_sha256"]:
        earlier = verdicts_of(before)
    new = verdicts_of(entry)
    again = {(verdict.runner, verdict.sample_sha256) for verdict in new}
    kept = [each for each in earlier if (each.runner, each.sample_sha256) not in again]
    failures = [verdict for verdict in kept if not verdict.passed]
    passes = [verdict for verdict in kept if verdict.passed][-_KEPT_PASSES:]
    verdicts = [*failures, *passes, *new]
    return {
        **entry,
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    }


def content_sha256(name: str, files: Mapping[str, FileRecord]) -> str:
    """Of what was compared: a graph with its weights.

    A new engine of the same name takes its verdicts with it (`build_engine`).

    Args:
        name: Of the graph or engine.
        files: Those of the manifest.
    """
    about = sorted({name, data_of(name), data_of(_GRAPH)} & set(files))
    digests = "".join(files[each].sha256 for each in about)
    return hashlib.sha256(digests.encode("ascii")).hexdigest()


def is_compared(name: str, files: Mapping[str, FileRecord], parity: Mapping[str, Any]) -> bool:
    """Whether a graph as it is now has been compared, and no failure stands."""
    entry = parity.get(name)
    return (
        isinstance(entry, Mapping)
        and entry.get("content_sha256") == content_sha256(name, files)
        and entry.get("passed") is True
    )


def verdicts_of(entry: Any) -> list[Verdict]:
    """The verdicts of a manifest's entry, failures of earlier comparisons first.

    Those that are malformed, as a manifest may come from anybody, are left out.
    """
    found = entry.get("verdicts") if isinstance(entry, Mapping) else None
    verdicts = []
    for content in found if isinstance(found, Sequence) else ():
        try:
            verdicts.append(Verdict.from_json(content))
        except (KeyError, TypeError):
            continue
    return verdicts


def standing_failures(entry: Any) -> list[Verdict]:
    """The failures that stand, of a manifest's entry for a graph or engine."""
    return [verdict for verdict in verdicts_of(entry) if not verdict.passed]


def failed_comparison(name: str, parity: Mapping[str, Any]) -> str | None:
    """That a graph failed its comparison, with the failures that stand.

    Args:
        name: Of the graph.
        parity: Of the manifest.

    Returns:
        A sentence; None if the graph passed, or has not been compared.
    """
    entry = parity.get(name, {"passed": True})
    if entry.get("passed"):
        return None
    standing = "; ".join(verdict.describe() for verdict in standing_failures(entry))
    return f"{name} did not pass its comparison with PyTorch" + (
        f": {standing}" if standing else ""
    )
