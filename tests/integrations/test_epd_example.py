"""The example that encodes apart from vLLM, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch

from mmvision_export import VisionEncoder
from tests.support.images import natural

ROOT = Path(__file__).parents[2]


def run(exported: Path, output: Path, *images: Path) -> list[dict[str, object]]:
    command = [sys.executable, str(ROOT / "examples" / "epd_vllm.py"), "--model", str(exported)]
    result = subprocess.run(
        [*command, "--output", str(output), *map(str, images)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_it_writes_each_image_once(exported: Path, tmp_path: Path) -> None:
    pictures = [natural(64, 96), natural(120, 80)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    output = tmp_path / "ec"
    first = run(exported, output, *paths)
    with VisionEncoder.open(exported) as encoder:
        wanted = [
            torch.from_numpy(each).to(torch.bfloat16) for each in encoder.encode_images(pictures)
        ]
    for line, reference in zip(first, wanted, strict=True):
        file = output / str(line["uuid"]) / "encoder_cache.safetensors"
        assert torch.equal(safetensors.torch.load_file(file)["ec_cache"], reference)
        assert line["new_tokens"] == len(reference)
    assert first[0]["uuid"] != first[1]["uuid"]
    again = run(exported, output, *paths)
    assert [line["new_tokens"] for line in again] == [0, 0]
