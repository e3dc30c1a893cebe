"""Runs over folders, with an encoder that only counts: no image stops another, none is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmvision_export.core.errors import BackendError
from mmvision_export.models.minimax_m3_vl.image_decoder import ImageDecoder
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.folder import encode_folder
from mmvision_export.runtime.folder_files import files_below
from tests.support.hostile_images import exif_block, fifo, jpeg_with_exif, png_of_zeros


class Counting:
    """Gives one token for each image, its first value: the mean of the patches."""

    dtype = np.dtype(np.float16)

    def __init__(self) -> None:
        self.batches: list[PackedBatch] = []
        self.fails_at: int | None = None

    def encode(self, batch: PackedBatch) -> np.ndarray:
        self.batches.append(batch)
        if len(self.batches) == self.fails_at:
            raise BackendError("the runtime failed")
        assert batch.pixel_values.dtype == self.dtype
        return np.full((1, 8), batch.pixel_values.mean(), np.float16)


def encoded(
    encoder: Counting, folder: Path, output: Path, *, force: bool = False, **options: Any
) -> list[dict[str, Any]]:
    output.mkdir(exist_ok=True)
    decoder = ImageDecoder(PreprocessorConfig(), **options)
    return list(
        encode_folder(encoder, decoder, files_below([folder]), output, "npy", force=force)  # type: ignore[arg-type]
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_image_stops_another(tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    png_of_zeros(folder / "a-bomb.png", 20000, 20000, bits=1)
    jpeg_with_exif(folder / "b-exif.jpg", b"MM\0*" + bytes([255] * 40))
    fifo(folder / "c-fifo.jpg")
    (folder / "d-gone.jpg").symlink_to("nowhere")
    jpeg_with_exif(folder / "e-good.jpg", exif_block(6))
    (folder / "f-postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n")
    (folder / "g-long" / ("x" * 251)).parent.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "g-long" / ("x" * 251 + ".png"))
    (folder / "h-link").symlink_to(".")
    strange = os.fsdecode(b"i-\xff.png")
    Image.new("RGB", (60, 40)).save(folder / strange)
    Image.new("RGB", (601, 3)).save(folder / "j-thin.png")
    (folder / "k-empty.jpg").write_bytes(b"")
    reports = encoded(Counting(), folder, output)
    statuses = {Path(report["input"]).name[:1]: report["status"] for report in reports}
    assert statuses.pop("b") in (
        "encoded",
        "failed",
    )  # as Pillow reads it; here it must not end all
    assert statuses == {
        "h": "passed_over",
        "a": "failed",
        "c": "failed",
        "d": "failed",
        "e": "encoded",
        "f": "failed",
        "i": "encoded",
        "j": "failed",
        "k": "failed",
        "x": "encoded",
    }
    for report in reports:
        if "output" in report:
            assert np.load(report["output"]).shape == (1, 8)
        else:
            assert report["input"] in report["error"]
    again = encoded(Counting(), folder, output)
    assert sum(report["status"] == "already_there" for report in again) == sum(
        report["status"] == "encoded" for report in reports
    )


def test_a_runtime_that_fails_once(tmp_path: Path) -> None:
    folder = photos(tmp_path, 7)
    encoder = Counting()
    encoder.fails_at = 3
    reports = encoded(encoder, folder, tmp_path / "out")
    assert [report["status"] for report in reports].count("failed") == 1
    assert reports[2]["status"] == "failed"
    assert "2.png: the runtime failed" in reports[2]["error"]
    again = encoded(encoder, folder, tmp_path / "out")
    assert [report["status"] for report in again].count("encoded") == 1


def photos(folder: Path, count: int) -> Path:
    (folder / "photos").mkdir()
    for index in range(count):
        Image.new("L", (60, 60), 20 * index).save(folder / "photos" / f"{index}.png")
    return folder / "photos"


def test_images_are_encoded_in_order_and_each_into_its_file(tmp_path: Path) -> None:
    folder = photos(tmp_path, 12)
    reports = encoded(Counting(), folder, tmp_path / "out")
    names = [Path(report["input"]).name for report in reports]
    assert names == sorted(f"{index}.png" for index in range(12))
    means = {name: float(np.load(tmp_path / "out" / f"{name}.npy")[0, 0]) for name in names}
    in_order = [means[f"{index}.png"] for index in range(12)]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) == 12


def test_what_changed_is_encoded_anew(tmp_path: Path) -> None:
    folder, output = photos(tmp_path, 4), tmp_path / "out"
    encoded(Counting(), folder, output)
    # An older picture in its place; an output cut to 100 bytes; one that is gone.
    Image.new("L", (60, 60), 255).save(folder / "0.png")
    os.utime(folder / "0.png", (0, 0))
    (output / "1.png.npy").write_bytes((output / "1.png.npy").read_bytes()[:100])
    (output / "2.png.npy").unlink()
    statuses = [report["status"] for report in encoded(Counting(), folder, output)]
    assert statuses == ["encoded", "encoded", "encoded", "already_there"]
    statuses = [report["status"] for report in encoded(Counting(), folder, output)]
    assert statuses == ["already_there"] * 4
    forced = encoded(Counting(), folder, output, force=True)
    assert [report["status"] for report in forced] == ["encoded"] * 4


def test_an_abandoned_run_goes_on(tmp_path: Path) -> None:
    folder, output = photos(tmp_path, 9), tmp_path / "out"
    output.mkdir()
    decoder = ImageDecoder(PreprocessorConfig())
    run = encode_folder(Counting(), decoder, files_below([folder]), output, "npy", force=False)  # type: ignore[arg-type]
    for _ in range(4):
        next(run)
    run.close()  # type: ignore[attr-defined]
    statuses = [report["status"] for report in encoded(Counting(), folder, output)]
    assert statuses == ["already_there"] * 4 + ["encoded"] * 5
