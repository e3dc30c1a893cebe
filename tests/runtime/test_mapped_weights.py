"""Weights that somebody writes into while an encoder uses them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmvision_export import VisionEncoder
from mmvision_export.artifacts.manifest import DATA
from mmvision_export.core.errors import BackendError
from tests.support.configs import GRIDS, HEAD_DIM_80, batch, copy_of

_BACKENDS = ("onnxruntime-cpu", "openvino")


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return str(request.param)


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return copy_of(exported, tmp_path / "model")


def test_written_into_is_refused(model: Path, backend: str) -> None:
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(model, backend=backend) as encoder:
        encoder(pixels, rows)
        with (model / DATA).open("r+b") as file:
            file.seek(4096)
            file.write(bytes(4096))
        with pytest.raises(BackendError, match="was changed while") as refusal:
            encoder(pixels, rows)
    assert "rename" in str(refusal.value.hint)


def test_made_shorter_is_refused_rather_than_read(model: Path, backend: str) -> None:
    """A read behind the end of a mapped file ends the process by SIGBUS."""
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(model, backend=backend) as encoder:
        encoder(pixels, rows)
        os.truncate(model / DATA, 0)
        with pytest.raises(BackendError, match="was changed while"):
            encoder(pixels, rows)


@pytest.mark.parametrize("change", ["rename", "remove", "link"])
def test_what_leaves_the_content_changes_nothing(model: Path, backend: str, change: str) -> None:
    """The control: `rename` is how files in use are to be replaced, `link` changes the time of change alone."""
    pixels, rows = batch(GRIDS["three"], HEAD_DIM_80)
    with VisionEncoder.open(model, backend=backend) as encoder:
        before = encoder(pixels, rows)
        data = model / DATA
        if change == "rename":
            other = data.with_name("other")
            other.write_bytes(bytes(data.stat().st_size))
            other.replace(data)
        elif change == "remove":
            data.unlink()
        else:
            os.link(data, data.with_name("second"))
        assert encoder(pixels, rows).tobytes() == before.tobytes()
