"""Folders, Parquet and URIs into tables: each row once, and equal to what the encoder gives it alone."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import BackendError, InputError, OutputError
from mmvision_export.embed.run import EmbedResult, embed
from mmvision_export.embed.settings import EmbedSettings
from mmvision_export.embed.tables import Columns
from mmvision_export.export.onnx_export import export_model_directory
from mmvision_export.models.weights import WeightSource
from mmvision_export.runtime.backends import BackendOptions
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, relative_l2
from tests.support.embedding import cells_of, embeddings_of, failures_of, images_in, noise
from tests.support.errors import refused

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CPU = BackendOptions(backend="onnxruntime-cpu", threads=1)
SETTINGS = EmbedSettings(rows_per_part=8, dtype="float32")

# bfloat16 has 8 bits: a value is off by at most half of the last, 2**-8 of its power of two.
BFLOAT16 = 2.0**-8
# docs/runtime.md: what a batch's other images change in float32, by the order of sums.
PACKING = 1e-6


def run(source: Path | str, output: Path, model: Path, **changes: Any) -> EmbedResult:
    arguments: dict[str, Any] = {"options": CPU, "settings": SETTINGS, **changes}
    return embed(str(source), output, model, **arguments)


def alone(model: Path, folder: Path) -> dict[str, np.ndarray]:
    """The embeddings of each image, one call each."""
    with VisionEncoder.open(model, CPU) as encoder:
        return {
            path.relative_to(folder).as_posix(): encoder.encode_images([Image.open(path)])[0]
            for path in sorted(folder.rglob("*.png"))
        }


@pytest.mark.parametrize(("dtype", "most"), [("float32", PACKING), ("bfloat16", BFLOAT16)])
def test_each_image_has_the_embeddings_that_it_has_alone(
    tmp_path: Path, exported: Path, dtype: Any, most: float
) -> None:
    folder = images_in(tmp_path / "in", 20)
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    result = run(folder, tmp_path / "out", exported, settings=settings)
    assert (result.rows, result.parts, result.embedded, result.failed) == (20, 3, 20, 0)
    expected, found = alone(exported, folder), embeddings_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    errors = {name: relative_l2(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= most
    # The control: an image's own embeddings are told from those of another of its size.
    sizes: dict[Any, list[str]] = {}
    for name, array in expected.items():
        sizes.setdefault(array.shape, []).append(name)
    one, other = next(names for names in sizes.values() if len(names) > 1)[:2]
    assert relative_l2(found[one], expected[other]) > most


def test_the_table_says_of_what_it_is(tmp_path: Path, exported: Path) -> None:
    folder = images_in(tmp_path / "in", 4)
    run(folder, tmp_path / "out", exported)
    (path,) = (tmp_path / "out" / "embeddings").iterdir()
    table = parquet.read_table(path)
    manifest = json.loads((exported / "manifest.json").read_text())["files"]
    assert table.column_names == ["id", "grid_thw", "embeddings", "weights_sha256", "model_sha256"]
    assert set(table["weights_sha256"].to_pylist()) == {manifest["model.onnx.data"]["sha256"]}
    assert set(table["model_sha256"].to_pylist()) == {manifest["model.cpu.onnx"]["sha256"]}
    assert table.schema.metadata == {b"dtype": b"float32", b"width": b"96"}
    for grid, cell in zip(
        table["grid_thw"].to_pylist(), table["embeddings"].to_pylist(), strict=True
    ):
        assert len(cell) == grid[1] * grid[2] // 4 * HEAD_DIM_80.text_hidden_size * 4


def test_failures_stand_in_a_table_of_their_own(tmp_path: Path, exported: Path) -> None:
    folder = images_in(tmp_path / "in", 10)
    (folder / "a" / "empty.jpg").write_bytes(b"")
    (folder / "text.txt").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / os.fsdecode(b"name-\xff.png")).write_bytes(b"GIF89a")
    result = run(folder, tmp_path / "out", exported)
    assert (result.embedded, result.failed) == (10, 4)
    failures = failures_of(tmp_path / "out")
    assert failures.keys() == {"a/empty.jpg", "text.txt", "gone.png", r"name-\xff.png"}
    assert not failures.keys() & cells_of(tmp_path / "out").keys()
    assert "text.txt" in failures["text.txt"]
    again = run(folder, tmp_path / "out", exported)
    assert (again.embedded, again.failed, again.already_embedded, again.already_failed) == (
        0,
        0,
        10,
        4,
    )
    retried = run(folder, tmp_path / "out", exported, retry_failed=True)
    assert retried.failed == 4
    assert failures_of(tmp_path / "out").keys() == failures.keys()


def test_what_is_missing_or_damaged_is_made_anew_and_the_rest_stays(
    tmp_path: Path, exported: Path
) -> None:
    folder, output = images_in(tmp_path / "in", 33), tmp_path / "out"
    run(folder, output, exported)
    files = sorted((output / "embeddings").iterdir())
    before = {file.name: file.read_bytes() for file in files}
    files[1].unlink()
    files[2].write_bytes(before[files[2].name][:-9])
    kept = {file.name: file.stat().st_ino for file in (files[0], files[3], files[4])}
    result = run(folder, output, exported)
    assert (result.embedded, result.already_embedded) == (16, 17)
    assert {file.name: file.read_bytes() for file in files} == before
    assert {name: (output / "embeddings" / name).stat().st_ino for name in kept} == kept


def test_what_belongs_to_another_run_is_refused(tmp_path: Path, exported: Path) -> None:
    folder, output = images_in(tmp_path / "in", 9), tmp_path / "out"
    run(folder, output, exported)
    content = cells_of(output)
    other = tmp_path / "other"
    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=2), other)
    with refused(OutputError, "weights_sha256"):
        run(folder, output, other)
    for name, value in (("rows_per_part", 4), ("dtype", "float16"), ("draft", False)):
        changed: dict[str, Any] = {name: value}
        settings = dataclasses.replace(SETTINGS, **changed)
        with refused(OutputError, name):
            run(folder, output, exported, settings=settings)
    with refused(OutputError, str(folder / "out")):
        run(folder, folder / "out", exported)
    noise(99).save(folder / "a" / "new.png")
    with refused(OutputError, "input_sha256"):
        run(folder, output, exported)
    assert cells_of(output) == content
    # With --force it is another run's from then on.
    assert run(folder, output, other, force=True).embedded == 10
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for force in (False, True):
        with refused(OutputError, str(foreign)):
            run(folder, foreign, exported, force=force)
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]


def test_a_dry_run_writes_nothing(tmp_path: Path, exported: Path) -> None:
    folder, output = images_in(tmp_path / "in", 9), tmp_path / "out"
    assert run(folder, output, exported, dry_run=True).embedded == 0
    assert not output.exists()
    run(folder, output, exported)
    with refused(OutputError, "rows_per_part"):
        run(folder, output, exported, dry_run=True, settings=EmbedSettings(dtype="float32"))


def encoded_image(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_parquet_with_ids_structs_and_nulls(tmp_path: Path, exported: Path) -> None:
    images = [encoded_image(noise(seed)) for seed in range(20)]
    values: list[Any] = [{"bytes": content, "path": "x.png"} for content in images]
    values[3], values[5]["bytes"] = None, b"no image"
    table = pyarrow.table({"key": list(range(100, 120)), "picture": values, "text": ["t"] * 20})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in" / "t.parquet", row_group_size=3)
    columns = Columns(image="picture", id="key")
    output = tmp_path / "out"
    result = run(tmp_path / "in", output, exported, columns=columns)
    # Row groups of 3, 3, 3, 3, 3, 3 and 2 rows: a part of 8 has room for 3, 3, or 3, 3 and 2.
    assert (result.parts, result.embedded, result.failed) == (3, 18, 2)
    assert failures_of(output).keys() == {"103", "105"}
    found = embeddings_of(output)
    assert found.keys() == {str(key) for key in range(100, 120)} - {"103", "105"}
    with VisionEncoder.open(exported, CPU) as encoder:
        for key in ("100", "110", "119"):
            (expected,) = encoder.encode_images([noise(int(key) - 100)])
            assert relative_l2(found[key], expected) <= PACKING
    # The same file by its URI, where rows have no ids: those of a file are its name and a number.
    uri = (tmp_path / "in" / "t.parquet").as_uri()
    named = run(uri, tmp_path / "out2", exported, columns=Columns(image="picture"))
    assert named.embedded == 18
    assert cells_of(tmp_path / "out2")["t.parquet:0"] == cells_of(output)["100"]


def test_a_uri_gives_what_its_folder_gives(tmp_path: Path, exported: Path) -> None:
    folder = images_in(tmp_path / "in", 12)
    (folder / "bad.png").write_bytes(b"")
    run(folder, tmp_path / "out", exported)
    run(folder.as_uri(), tmp_path / "out2", exported)
    assert cells_of(tmp_path / "out") == cells_of(tmp_path / "out2")
    assert failures_of(tmp_path / "out2").keys() == {"bad.png"}


def test_inputs_that_are_refused(tmp_path: Path, exported: Path) -> None:
    output = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, fact, reason in (
        (empty, str(empty), "missing"),
        (tmp_path / "gone", "gone", "missing"),
        ("nothing://x", "nothing://x", "unreadable"),
        (exported / "manifest.json", "manifest.json", None),
    ):
        with refused(InputError, fact, reason=reason):  # type: ignore[arg-type]
            run(source, output, exported)
    table = tmp_path / "tables"
    table.mkdir()
    parquet.write_table(pyarrow.table({"image": ["text"], "n": [1.5]}), table / "t.parquet")
    for columns, fact in (
        (Columns(), "image"),
        (Columns(image="nowhere"), "nowhere"),
        (Columns(id="n"), "image"),
    ):
        with refused(InputError, fact):
            run(table, output, exported, columns=columns)
    noise(1).save(table / "x.png")
    with refused(InputError, str(table)):
        run(table, output, exported)
    (table / "x.png").unlink()
    (table / "t.parquet").write_bytes(b"PAR1 and nothing")
    with refused(InputError, "t.parquet", reason="unreadable"):
        run(table, output, exported)
    assert not output.exists()


def start(folder: Path, output: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmvision_export", "embed", "--input", str(folder)]
    command += ["--output", str(output), "--model", str(model), "--rows-per-part", "8"]
    command += ["--backend", "onnxruntime-cpu", "--threads", "1", "--dtype", "float32", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_after(process: subprocess.Popen[str], output: Path, parts: int) -> None:
    """Kill a run once it has so many parts, wherever it then is."""
    while process.poll() is None and len(list(output.glob("embeddings/*.parquet"))) < parts:
        time.sleep(0.001)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_runs_that_are_killed_have_every_row_once(
    tmp_path: Path, exported: Path, count: int
) -> None:
    folder = images_in(tmp_path / "in", count)
    whole, output = tmp_path / "whole", tmp_path / "out"
    run(folder, whole, exported)
    parts = count // 8 + bool(count % 8)
    seen = 0
    for step in (0, 1, parts // 2, parts - 2):
        killed_after(start(folder, output, exported), output, step)
        found = len(list(output.glob("embeddings/*.parquet")))
        assert seen <= found
        seen = found
    assert seen >= parts - 2
    assert cells_of(output).items() <= cells_of(whole).items()  # nothing half done is seen
    process = start(folder, output, exported)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert cells_of(output) == cells_of(whole)
    assert len(cells_of(output)) == count
    left = [path.name for path in output.rglob(".new.*")]
    assert left == []


def test_an_interrupted_run_says_so_and_keeps_what_was_finished(
    tmp_path: Path, exported: Path
) -> None:
    folder, output = images_in(tmp_path / "in", 200), tmp_path / "out"
    process = start(folder, output, exported)
    while not list(output.glob("embeddings/*.parquet")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert 8 <= len(cells_of(output)) < 200
    assert list(output.rglob(".new.*")) == []


def test_a_second_run_is_kept_out(tmp_path: Path, exported: Path) -> None:
    folder, output = images_in(tmp_path / "in", 200), tmp_path / "out"
    process = start(folder, output, exported)
    try:
        while not list(output.glob("embeddings/*.parquet")):
            assert process.poll() is None
            time.sleep(0.001)
        with refused(OutputError, str(output)):
            run(folder, output, exported)
    finally:
        process.kill()
        process.communicate()


def test_the_command(mmvision: Command, tmp_path: Path, exported: Path) -> None:
    folder = images_in(tmp_path / "in", 10)
    command = ["embed", "--input", str(folder), "--output", "out", "--model", str(exported)]
    dry = mmvision(*command, "--dry-run")
    assert (dry.code, "would embed 10" in dry.out) == (0, True)
    done = mmvision(*command, "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert (printed["kind"], printed["rows"], printed["embedded"]) == ("embed", 10, 10)
    (folder / "bad.png").write_bytes(b"")
    changed = mmvision(*command)
    assert changed.code == 1
    assert "input_sha256" in changed.errors[0]
    forced = mmvision(*command, "--force", "--quiet")
    assert (forced.code, forced.err) == (1, "")
    assert "10 embedded, 1 failed" in forced.out


def test_without_pyarrow_the_error_says_what_to_install(
    mmvision: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = images_in(tmp_path / "in", 1)
    result = mmvision("embed", "--input", str(folder), "--output", "out", "--model", str(exported))
    assert result.code == 1
    assert "pyarrow" in result.errors[0]
    assert "[embed]" in result.errors[1]
    with refused(BackendError, "pyarrow"):
        run(folder, tmp_path / "out", exported)
