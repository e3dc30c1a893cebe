"""The examples, by the commands that their own docstrings give, as a user types them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmvision_export import VisionEncoder
from mmvision_export.triton_server.repository import write_repository
from tests.support.images import natural
from tests.support.triton_server import no_server, server_folder, serving
from tests.support.triton_settings import settings

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def command_of(name: str) -> list[str]:
    """The line of an example's docstring that runs it."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / name).read_text())) or ""
    (line,) = re.findall(rf"^ +python (examples/{name} .+)$", docstring, re.M)
    return shlex.split(line)


def ran(
    name: str, folder: Path, *more: str, code: int = 0, environment: dict[str, str] | None = None
) -> list[Any]:
    """What an example prints, run in a folder; it must end with this code."""
    script, *arguments = command_of(name)
    ended = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments, *more],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        | (environment or {}),
    )
    assert ended.returncode == code, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """What the docstrings name: a model, two images, and a folder with both and a broken one."""
    path = tmp_path_factory.mktemp("examples")
    shutil.copytree(exported, path / "engines" / "tiny")
    natural(90, 140).save(path / "photo.jpg")
    natural(120, 64).save(path / "scan.png")
    (path / "photos" / "inner").mkdir(parents=True)
    shutil.copy(path / "photo.jpg", path / "photos")
    shutil.copy(path / "scan.png", path / "photos" / "inner")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[np.ndarray]:
    """Embeddings of the two images, `[tokens, width]` each."""
    with VisionEncoder.open(folder / "engines" / "tiny") as encoder:
        return encoder.encode_images([folder / "photo.jpg", folder / "scan.png"])


def mean_norm(embeds: np.ndarray) -> float:
    return float(np.linalg.norm(embeds.astype(np.float32), axis=1).mean())


def refuse_other(lines: list[Any], reference: list[np.ndarray]) -> None:
    """What an example says of the two images is what they have."""
    assert [line["tokens"] for line in lines] == [len(each) for each in reference]
    for line, each in zip(lines, reference, strict=True):
        # Printed with four digits behind the point.
        assert line["mean_norm"] == pytest.approx(mean_norm(each), abs=1e-3)


def test_control_another_images_figures_are_refused(reference: list[np.ndarray]) -> None:
    lines = [{"tokens": len(each), "mean_norm": mean_norm(each)} for each in reference]
    refuse_other(lines, reference)
    with pytest.raises(AssertionError):
        refuse_other(lines[::-1], reference)
    with pytest.raises(AssertionError):
        refuse_other([{**line, "mean_norm": line["mean_norm"] * 1.01} for line in lines], reference)


def test_first_embedding(folder: Path, reference: list[np.ndarray]) -> None:
    lines = ran("first_embedding.py", folder)
    assert [line["image"] for line in lines] == ["photo.jpg", "scan.png"]
    for line, each in zip(lines, reference, strict=True):
        np.testing.assert_array_equal(np.load(folder / line["output"]), each)


def test_folder_goes_on_where_it_stopped_and_past_what_is_no_image(
    folder: Path, reference: list[np.ndarray], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "embeds", ignore_errors=True)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    first = {line["image"]: line for line in ran("folder.py", tmp_path, code=1)}
    assert first["photos/broken.jpg"]["status"] == "failed"
    assert first["photos/photo.jpg"]["tokens"] == len(reference[0])
    # Alone and not beside the other: sums may have another order (docs/runtime.md).
    np.testing.assert_allclose(
        np.load(tmp_path / "embeds" / "inner" / "scan.png.npy"), reference[1], rtol=0, atol=1e-4
    )
    (tmp_path / "photos" / "broken.jpg").unlink()
    again = ran("folder.py", tmp_path)
    assert [line["status"] for line in again] == ["already_there"] * 2
    assert not list(tmp_path.glob("embeds/**/.*"))


def test_video(folder: Path) -> None:
    videos = pytest.importorskip("tests.support.videos", reason="PyAV is not installed")
    videos.write_video(folder / "clip.mp4", videos.moving(24))
    lines = ran("video.py", folder)
    with VisionEncoder.open(folder / "engines" / "tiny") as encoder:
        segments = list(encoder.encode_video(folder / "clip.mp4", fps=2))
    assert len(segments) > 1
    refuse_other(lines, [segment.image_embeds for segment in segments])
    assert lines[0]["seconds"][0] == 0


def test_torch_tensors(folder: Path, reference: list[np.ndarray]) -> None:
    lines = ran("torch_device.py", folder)
    refuse_other(lines, reference)
    assert {line["device"] for line in lines} == {"cpu"}


@contextlib.contextmanager
def triton(repository: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Options and environment with which a client is answered: by a server, or by a stand-in."""
    if no_server():
        package = repository.parent / "stand_in" / "tritonclient"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "http.py").write_text("from tests.support.triton_client import *\n")
        path = os.pathsep.join([str(package.parent), str(ROOT)])
        yield [], {"PYTHONPATH": path, "MMVISION_STAND_IN_REPOSITORY": str(repository)}
        return
    program = server_folder(repository.parent / "server")
    log = repository.parent / "log"
    with serving(program, repository, ["vision_encoder"], log) as server:
        yield ["--url", server.http], {}


def test_triton_client(folder: Path, reference: list[np.ndarray], tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_repository(folder / "engines" / "tiny", repository, settings(threads=1))
    with triton(repository) as (options, environment):
        lines = ran("triton_client.py", folder, *options, environment=environment)
    refuse_other(lines, reference)


def test_embed_on_ray(folder: Path, reference: list[np.ndarray]) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    counts, *rows = ran("embed_ray.py", folder)
    assert counts == {"embedded": 2, "failed": 0, "rows": 2}
    tokens = {row["image"]: row["tokens"] for row in rows}
    assert tokens == {"photo.jpg": len(reference[0]), "inner/scan.png": len(reference[1])}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60
    assert command_of(example.name)
    assert importlib.util.spec_from_file_location(example.stem, example) is not None
    assert f"({example.name})" in (ROOT / "examples" / "README.md").read_text()
