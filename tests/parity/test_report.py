"""The report as a reader opens it, in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvision_export.artifacts.manifest import Manifest
from mmvision_export.core.errors import OutputError
from mmvision_export.engine.float16 import derive_fp16
from mmvision_export.models.minimax_m3_vl import reference
from mmvision_export.parity.report.maps import _token_maps, image_maps, worst_images
from mmvision_export.parity.report.page import checked_report_path
from mmvision_export.parity.samples import Sample
from tests.support.command import Command
from tests.support.configs import HEAD_DIM_80, batch, copy_of
from tests.support.errors import refused
from tests.support.faults import interleave_rotary_pairs, rewrite

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: apt-get install chromium"
)


def photo(path: Path, width: int, height: int) -> Path:
    row, column = np.mgrid[:height, :width]
    levels = np.stack([row * 255 // height, column * 255 // width, (row + column) % 256], axis=-1)
    Image.fromarray(levels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def faulty(exported: Path, tmp_path: Path) -> Path:
    directory = copy_of(exported, tmp_path / "faulty")
    rewrite(directory, interleave_rotary_pairs)
    return directory


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    profile = page.parent / "profile"
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
         "--enable-logging=stderr", "--window-size=1100,2600", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def console_errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_passing_report_of_real_images(mmvision: Command, exported: Path, tmp_path: Path) -> None:
    directory = copy_of(exported, tmp_path / "m")
    derive_fp16(directory, Manifest.read(directory))
    images = [photo(tmp_path / "wi$d$e<b>.png", 300, 120), photo(tmp_path / "tall.png", 90, 200)]
    page = tmp_path / "report.html"
    options = [option for image in images for option in ("--image", str(image))]
    result = mmvision("parity", "--model", str(directory), "--report", str(page), *options)
    assert result.code == 0, result.err
    text = page.read_text()
    # Nothing beside it is needed.
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "url(http" not in text
    assert "@import" not in text

    dom = browse(page, "--dump-dom")
    assert console_errors(dom) == []
    assert "PASS." in dom.stdout
    assert "FAIL" not in dom.stdout
    assert dom.stdout.count('<svg role="img" aria-label=') == 2  # errors and magnitudes
    assert 'alt="wi$d$e&lt;b&gt;.png as encoded"' in dom.stdout
    assert "can hold. float16" in " ".join(dom.stdout.split())
    assert len(text) < 300_000

    browse(page, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as screenshot:
        pixels = np.asarray(screenshot.convert("RGB"))
    assert pixels.shape[:2] == (2600, 1100)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # figures are drawn
    green = (pixels == (0xE9, 0xF7, 0xEF)).all(axis=-1)
    assert green.sum() > 10_000  # the verdict

    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["passed"] is True
    assert numbers["samples"]["images"]["files"] == ["wi$d$e<b>.png", "tall.png"]
    assert (
        len(numbers["layers"]["graphs"]["model.fp16.onnx"]["stages"])
        == HEAD_DIM_80.num_hidden_layers + 4
    )


@needs_browser
def test_a_failing_report_names_the_layer(mmvision: Command, faulty: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = mmvision("parity", "--model", str(faulty), "--report", str(page))
    assert result.code == 1
    assert "the error jumps at layers.1" in result.out
    dom = browse(page, "--dump-dom").stdout
    assert "FAIL." in dom
    assert "jumps at layers.1" in dom
    assert (
        json.loads(page.with_suffix(".json").read_text())["layers"]["graphs"]["model.onnx"]["jump"][
            "stage"
        ]
        == "layers.1"
    )


@needs_browser
def test_a_broken_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><script>missing()</script>")
    assert console_errors(browse(page, "--dump-dom"))


def test_a_report_is_not_written_over(mmvision: Command, exported: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    result = mmvision("parity", "--model", str(exported), "--report", str(page))
    assert result.code == 1
    assert result.errors[0] == f"error: {page} already exists"
    assert page.read_text() == "mine"
    with refused(OutputError, "--report", ".html", tmp_path / "report.pdf"):
        checked_report_path(tmp_path / "report.pdf", force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pixel-values", "x.npy"], "--pixel-values and --grid-thw go together"),
        (
            ["--image", "x.png", "--pixel-values", "x.npy", "--grid-thw", "g.npy"],
            "give either --image or",
        ),
    ],
)
def test_usage(mmvision: Command, options: list[str], message: str) -> None:
    result = mmvision("parity", *options)
    assert result.code == 2
    assert message in result.errors[0]


def test_tokens_stand_in_their_place() -> None:
    """Against the reference's positions of patches."""
    grid = [(2, 4, 6), (1, 2, 8)]
    one = Sample("sample", *batch(grid, HEAD_DIM_80))
    tokens = sum(t * h * w for t, h, w in grid) // 4
    maps = _token_maps(one, np.arange(tokens, dtype=np.float64), 2)
    start = 0
    for (t, h, w), found in zip(grid, maps, strict=True):
        first_patches = reference.patch_positions(t, h, w, 2)[::4]
        for token, (frame, row, column) in enumerate(first_patches):
            assert found[frame, row // 2, column // 2] == start + token
        start += len(first_patches)
    errors = np.zeros(tokens)
    errors[-1] = np.nan
    assert worst_images(one, errors, 2) == [0, 1]


def test_graphs_that_agree_share_a_map() -> None:
    one = Sample("sample", *batch([(1, 4, 6), (1, 2, 8)], HEAD_DIM_80))
    errors = np.linspace(1e-3, 2e-3, 10)
    other = errors[::-1]
    found = image_maps(one, {"a": errors, "b": errors * 1.05, "c": other}, 2)
    assert [image.tokens for image in found] == [(2, 3), (1, 4)]
    assert [each.runners for each in found[0].maps] == [["a", "b"], ["c"]]
    # Colours span what differs, over all images of a runner.
    assert (found[1].maps[0].least, found[1].maps[0].most) == (1e-3, 2e-3)
    broken = np.where(np.arange(10) == 9, np.nan, errors)
    assert image_maps(one, {"a": broken}, 2)[1].maps[0].frames != found[1].maps[0].frames
