"""Does every snippet of docs/python.md run, in the page's order, and print what it promises?"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.support.images import natural
from tests.support.markdown import fenced_blocks
from tests.support.videos import moving, write_video

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def _run(text: str, names: dict[str, Any]) -> list[str]:
    """Run the page's snippets in one namespace, and give what each printed."""
    printed = []
    for number, (language, body) in enumerate(fenced_blocks(text), 1):
        assert language == "python"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(body, f"{PAGE.name}, snippet {number}", "exec"), names)
        printed.append(output.getvalue())
    return printed


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    natural(160, 112).save("photo.jpg")
    write_video(Path("clip.mp4"), moving(8))
    exported, compared, built, encoded, refused = _run(PAGE.read_text(), {})
    assert exported.startswith("fp32 23 ['model.cpu.onnx'")
    assert {line.split()[0] for line in compared.splitlines()} >= {"model.onnx", "model.cpu.onnx"}
    assert ".engine" in built
    # 160 x 112 pixels become 12 x 8 patches: 24 image tokens.
    assert encoded.startswith("(24, 512) float32\n")
    assert encoded.endswith("onnxruntime-cpu model.cpu.onnx\n")
    assert "engines/nope" in refused


def test_control_a_snippet_that_is_wrong_is_found() -> None:
    text = PAGE.read_text()
    wrong = text.replace(
        'WeightSource.random("tiny", seed=0)', 'WeightSource.random("tiny", sed=0)'
    )
    assert wrong != text
    with pytest.raises(TypeError, match="sed"):
        _run(wrong, {})
