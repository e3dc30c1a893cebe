"""The page and the charts of a result, and the page written again from its results.json."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmvision_export.benchmark.charts import CHARTS, _apart, charts_of, write_charts
from mmvision_export.benchmark.report import page_from_result
from mmvision_export.benchmark.result import Result, result_from_file
from mmvision_export.core.errors import BenchmarkError, InputError
from tests.support.command import Command
from tests.support.errors import refused

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "benchmarks" / "results.json"


@pytest.fixture(scope="module")
def result() -> Result:
    return result_from_file(RESULTS)


def faster(result: Result, side: str) -> Result:
    """The same result, but for one side that takes a millisecond of everything."""
    rows = [
        dataclasses.replace(m, seconds=[1e-3] * len(m.seconds)) if m.side == side else m
        for m in result.measurements
    ]
    return dataclasses.replace(result, measurements=rows)


def rows_of(page: str) -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[cell.replace("\N{NO-BREAK SPACE}", " ").strip() for cell in row] for row in rows]


@pytest.mark.parametrize("name", ["benchmarks", "photographs"])
def test_the_pages_of_the_docs_are_those_of_their_results(name: str) -> None:
    kept = result_from_file(DOCS / name / "results.json")
    page = (DOCS / f"{name}.md").read_text()
    assert page == page_from_result(kept, plots=name)
    assert page != page_from_result(faster(kept, "openvino"), plots=name)  # the control
    pictures = {path.name for path in (DOCS / name).glob("*.svg")}
    assert pictures == set(charts_of(kept)) == set(re.findall(rf"\({name}/(.+?)\)", page))


def test_the_first_sentence_is_the_answer(result: Result) -> None:
    def first(of: Result) -> str:
        return page_from_result(of, plots="x").splitlines()[2]

    assert result.photograph is not None
    times = {
        side: measured.median
        for side in result.sides
        if (measured := result.of(side, result.photograph.name)) is not None
    }
    in_fp32 = [side for side in times if result.sides[side]["precision"] == "fp32"]
    best, best_in_fp32 = min(times, key=times.__getitem__), min(in_fp32, key=times.__getitem__)
    assert first(result).startswith(f"**{result.label(best)} is the fastest: {times[best]:.3g} s")
    assert best != best_in_fp32
    said = f"{result.label(best_in_fp32)} is the fastest with {times[best_in_fp32]:.3g} s."
    assert f"Of the sides in fp32, {said}" in first(result)
    assert "4 of the 32 released layers" in first(result)
    # The control: another side wins.
    other = first(faster(result, "openvino"))
    assert other.startswith("**OpenVINO fp32 is the fastest: 0.001 s")
    assert "Of the sides in fp32" not in other


def test_a_photograph_is_a_warm_single_image(result: Result) -> None:
    assert result.photograph is not None
    first = next(iter(result.sides))
    warm = [
        w.patches
        for w in result.workloads
        if len(w.grid) == 1 and (m := result.of(first, w.name)) is not None and m.warm
    ]
    assert result.photograph.patches == max(warm)
    assert result.photograph.patches < max(w.patches for w in result.workloads)  # one was cold
    several = [w for w in result.workloads if len(w.grid) > 1]
    without = dataclasses.replace(result, workloads=several)
    assert without.photograph is None
    page = page_from_result(without, plots="x")
    assert "photograph.svg" not in page
    assert page.splitlines()[2].startswith(f"Times of {len(result.sides)} sides")


def test_tables_are_no_wider_than_a_page_and_name_sides_for_people(result: Result) -> None:
    page = page_from_result(result, plots="x")
    rows = rows_of(page)
    assert max(len(row) for row in rows) <= 7
    prose, _, command = page.partition("```")
    for side in result.sides:
        assert not re.search(rf"(^|[^\w-]){re.escape(side)}($|[^\w-])", prose), side
        assert side in command
    heads = {cell for row in rows for cell in row}
    assert {"OpenVINO bf16", "ONNX Runtime INT8", "PyTorch compiled fp32"} <= heads


def test_every_ratio_is_on_the_page(result: Result) -> None:
    rows = rows_of(page_from_result(result, plots="x"))
    for workload in result.workloads:
        cells = [cell for row in rows if row[0] == workload.name for cell in row[1:]]
        for side in list(result.sides)[1:]:
            ratio = result.ratio(side, workload.name)
            assert (f"{ratio:.2f}" if ratio is not None else "-") in cells


def texts_of(chart: Path) -> list[str]:
    return [node.text or "" for node in ET.parse(chart).iter("{http://www.w3.org/2000/svg}text")]


def test_charts_name_every_side_beside_its_line(result: Result, tmp_path: Path) -> None:
    write_charts(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(CHARTS)
    for name in CHARTS:
        texts = texts_of(tmp_path / name)
        for side, facts in result.sides.items():
            if name != "roofline.svg" or facts["precision"] == "fp32":
                assert texts.count(result.label(side)) == 1, (name, side)
    assert result.photograph is not None
    seconds = result.fastest_first(result.photograph)[0][1]
    assert f"{seconds:.3g} s" in texts_of(tmp_path / "photograph.svg")
    assert "#000000" not in (tmp_path / "latency.svg").read_text()  # not read on a dark page


def test_one_size_makes_no_line(result: Result, tmp_path: Path) -> None:
    one = dataclasses.replace(result, workloads=[result.workloads[1]])
    assert charts_of(one) == ["photograph.svg", "roofline.svg"]
    write_charts(one, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(charts_of(one))
    assert "latency.svg" not in page_from_result(one, plots="x")


@given(st.lists(st.floats(0, 300), max_size=12).map(sorted))
def test_labels_do_not_lie_on_each_other(wanted: list[float]) -> None:
    places = _apart(wanted, 13.0)
    assert all(b - a >= 13.0 - 1e-6 for a, b in itertools.pairwise(places))
    if all(b - a >= 13.0 for a, b in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted)
    # Nobody is moved for nothing: what moves up and what moves down is in balance.
    assert sum(places) == pytest.approx(sum(wanted), abs=1e-6)


def test_a_result_is_read_back_as_it_was_written(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result.to_dict()))
    assert result_from_file(path) == result


def no_side(content: dict[str, Any]) -> None:
    content["measurements"][3]["side"] = "tvm"


def no_first(content: dict[str, Any]) -> None:
    first = next(iter(content["sides"]))
    content["measurements"] = [m for m in content["measurements"] if m["side"] != first]


def no_time(content: dict[str, Any]) -> None:
    content["measurements"][0]["seconds"] = ["fast"]


def no_machine(content: dict[str, Any]) -> None:
    del content["machine"]


@pytest.mark.parametrize("spoil", [no_side, no_first, no_time, no_machine])
def test_another_file_is_no_result(spoil: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    content = json.loads(RESULTS.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with refused(BenchmarkError, path, "is no result"):
        result_from_file(path)
    path.write_text("[]")
    with refused(BenchmarkError, path, "is no result"):
        result_from_file(path)
    path.unlink()
    with refused(InputError, path, reason="missing"):
        result_from_file(path)


def test_the_command_writes_the_page_again(mmvision: Command, tmp_path: Path) -> None:
    again = ("benchmark", "--results", str(RESULTS), "--page", "speed.md")
    assert mmvision(*again).code == 0
    page = (tmp_path / "speed.md").read_text()
    assert page == (DOCS / "benchmarks.md").read_text().replace("](benchmarks/", "](speed/")
    assert (tmp_path / "speed" / "results.json").read_bytes() == RESULTS.read_bytes()
    assert (tmp_path / "speed" / "photograph.svg").exists()
    assert mmvision(*again).errors[0].startswith("error: speed.md already exists")
    assert mmvision(*again, "--force").code == 0
    assert (
        mmvision(*again[:3]).errors[0] == "error: --results goes with --page, and without --output"
    )
    assert mmvision(*again, "--output", "x", "--force").code == 1
    assert not (tmp_path / "x").exists()
