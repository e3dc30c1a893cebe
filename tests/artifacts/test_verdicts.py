"""A failure stands until the same sample passes or the graph is another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.artifacts.verdicts import (
    Verdict,
    entry_with_history,
    standing_failures,
    verdicts_of,
)
from mmvision_export.cli.parity_output import standing_lines
from mmvision_export.parity.advice import next_step
from mmvision_export.parity.check import check_parity
from mmvision_export.parity.result import ParityResult, record_parity
from mmvision_export.parity.samples import samples_from_grids
from tests.support.configs import HEAD_DIM_80, copy_of


def verdict(sample: str, *failures: str, runner: str = "g") -> Verdict:
    return Verdict(runner, sample, f"sha of {sample}", "2026-11-28T00:00:00", failures, 1e-3, 0.99)


def entry(*verdicts: Verdict, content: str = "x") -> dict[str, Any]:
    found = [dataclasses.asdict(each) for each in verdicts]
    return {"content_sha256": content, "verdicts": found}


def test_an_easier_sample_changes_nothing() -> None:
    first = entry_with_history(None, entry(verdict("hard", "cosine 0.9")))
    assert not first["passed"]
    second = entry_with_history(first, entry(verdict("easy")))
    assert not second["passed"]
    assert [each.sample for each in standing_failures(second)] == ["hard"]
    assert "cosine 0.9" in standing_failures(second)[0].describe()
    third = entry_with_history(second, entry(verdict("hard")))
    assert third["passed"]
    assert not standing_failures(third)


def test_another_runner_is_another_verdict() -> None:
    first = entry_with_history(None, entry(verdict("s", "off", runner="g (OpenVINO)")))
    assert not entry_with_history(first, entry(verdict("s")))["passed"]


def test_another_graph_forgets() -> None:
    first = entry_with_history(None, entry(verdict("hard", "cosine 0.9")))
    second = entry_with_history(first, entry(verdict("easy"), content="y"))
    assert second["passed"]
    assert [each.sample for each in verdicts_of(second)] == ["easy"]


def test_failures_are_kept_and_passes_are_bounded() -> None:
    found: dict[str, Any] | None = entry_with_history(None, entry(verdict("hard", "off")))
    for number in range(100):
        found = entry_with_history(found, entry(verdict(f"easy {number}")))
    assert len(verdicts_of(found)) < 60
    assert [each.sample for each in standing_failures(found)] == ["hard"]


@pytest.mark.parametrize("content", [None, 3, {"verdicts": 3}, {"verdicts": [3, {}]}])
def test_what_anybody_may_have_written(content: Any) -> None:
    assert verdicts_of(content) == []


def failing(result: ParityResult) -> ParityResult:
    rows = [
        dataclasses.replace(row, failures=["cosine 0.9"]) if row.subject == GRAPH else row
        for row in result.rows
    ]
    return dataclasses.replace(result, rows=rows)


def test_of_real_comparisons(exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    samples = samples_from_grids(HEAD_DIM_80, {"hard": ((1, 4, 4),), "easy": ((1, 2, 2),)})
    hard, easy = (check_parity(directory, samples=[sample]) for sample in samples)
    record_parity(failing(hard))
    after = record_parity(easy)
    assert after.parity == Manifest.read(directory).parity
    assert after.parity[GRAPH]["passed"] is False
    assert after.parity["model.cpu.onnx"]["passed"] is True
    (said,) = standing_lines(easy, after)
    assert "hard" in said
    assert next_step(easy) is None
    assert "--report" in str(next_step(failing(hard)))
    assert record_parity(hard).parity[GRAPH]["passed"] is True
