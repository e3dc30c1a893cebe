"""The fit of times to the sum of squares, and the counts of each way of attention."""

from __future__ import annotations

import dataclasses

import pytest

from mmvision_export.benchmark.report import page_from_result
from mmvision_export.benchmark.result import Measurement, Result
from mmvision_export.benchmark.scaling import fit_of
from mmvision_export.benchmark.workloads import PHOTOGRAPHS, Workload
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.costs import Costs

CONFIG = EncoderConfig(num_hidden_layers=4)
PER_PATCH, PER_PAIR = 8e-4, 5e-8


def squares(workload: Workload) -> int:
    return sum((t * h * w) ** 2 for t, h, w in workload.grid)


def result_with(dense: bool) -> Result:
    """Times that follow the sum of the squares, or the square of the batch."""
    rows = [
        Measurement(
            side="onnxruntime-cpu",
            workload=w.name,
            seconds=[PER_PATCH * w.patches + PER_PAIR * (w.patches**2 if dense else squares(w))],
            warm=True,
            cpu_s=1.0,
            foreign_cpus=0.0,
            above_bytes=1,
            peak_bytes=1,
            relative_l2=0.0,
            min_cosine=1.0,
            device_ms=None,
        )
        for w in PHOTOGRAPHS
    ]
    facts = {"version": "1", "precision": "fp32", "open_s": 1.0, "rss_bytes": 1, "file_bytes": 0}
    model = {
        "config": dataclasses.asdict(CONFIG),
        "flops": {w.name: 1e12 for w in PHOTOGRAPHS},
        "source": "random",
        "precision": "fp32",
        "patches_per_token": 4,
    }
    machine = {
        "date": "today",
        "cpus": 2,
        "cpu": "x",
        "memory_bytes": 1e9,
        "system": "x",
        "python": "3",
        "mmvision-export": "0",
    }
    return Result(
        machine,
        model,
        2,
        {"onnxruntime-cpu": facts},
        {"a": 500.0},
        list(PHOTOGRAPHS),
        rows,
        [],
        workload_set="photographs",
    )


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    fit = fit_of(result_with(dense=False), "onnxruntime-cpu")
    assert fit is not None
    assert fit.per_patch == pytest.approx(PER_PATCH)
    assert fit.per_pair == pytest.approx(PER_PAIR)
    assert fit.worst < 1e-9
    assert fit.points == len(PHOTOGRAPHS)


def test_the_square_of_the_batch_does_not_fit() -> None:
    """The control: a batch of several images tells the two apart."""
    fit = fit_of(result_with(dense=True), "onnxruntime-cpu")
    assert fit is not None
    assert fit.worst > 0.2


def test_few_batches_are_not_fitted() -> None:
    result = result_with(dense=False)
    result.workloads = result.workloads[:3]
    assert fit_of(result, "onnxruntime-cpu") is None


def test_the_page_counts_each_way() -> None:
    page = page_from_result(result_with(dense=False), plots="x")
    assert page.startswith("# Photographs at full size")
    rows = [line for line in page.splitlines() if line.startswith("| 4 images of 4096 patches |")]
    # The counted tables are the last: operations, then memory.
    cells = [cell.strip() for cell in rows[-2].split("|")[2:-1]]
    memory = [float(cell) for cell in rows[-1].split("|")[2:-1]]
    patches = 4 * 4096
    inside = Costs(CONFIG, masked=False).of(patches, 4 * 4096**2) / 1e12
    across = Costs(CONFIG, masked=True).of(patches, 0) / 1e12
    assert float(cells[0]) == pytest.approx(inside, rel=1e-2)
    assert float(cells[1]) == pytest.approx(inside, rel=1e-2)  # slots that are full
    assert float(cells[2]) == pytest.approx(across, rel=1e-2)
    assert across > 1.5 * inside
    assert len(memory) == 4
    assert memory[3] > 10 * memory[2]  # scores kept, against a fused kernel
    assert "computed, not measured" not in page
