"""What a new user types and sees, from the wheel, in an empty environment outside the checkout.

`new_user.txt` is the script and what it must print. After a change that is meant, write it anew:
`tests/support/transcript.py` says how.
"""

from __future__ import annotations

import email
import email.message
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.markdown import links_in
from tests.support.transcript import commands_in, masked, transcript_of

ROOT = Path(__file__).parents[2]
TRANSCRIPT = Path(__file__).with_name("new_user.txt")

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@slow
def test_every_link_of_the_wheels_readme_is_absolute(wheel: Path) -> None:
    links = links_in(_metadata(wheel).get_payload(decode=True).decode())  # type: ignore[union-attr]
    source = links_in((ROOT / "README.md").read_text())
    assert len(links) == len(source)
    assert [link for link in links if not link.startswith("https://")] == []
    # The control: the README of the checkout has links of its own, so that this can fail.
    relative = [link for link in source if not link.startswith("https://")]
    assert len(relative) > 10
    for link, shown in zip(source, links, strict=True):
        assert shown.endswith(link)


@slow
def test_the_wheel_has_what_a_user_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in ("py.typed", "_plugins/CMakeLists.txt", "_plugins/varlen_attention/kernel.py"):
        assert f"mmvision_export/{name}" in names
    metadata = _metadata(wheel)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Keywords"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def _pictures(folder: Path) -> None:
    y, x = np.mgrid[0:150, 0:200]
    image = Image.fromarray(np.stack([x, y, (x * y) % 256], axis=-1).astype(np.uint8))
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        image.save(folder / name)


@slow
def test_a_new_user_sees_what_the_transcript_shows(wheel: Path, tmp_path: Path) -> None:
    environment, home = tmp_path / "environment", tmp_path / "home"
    home.mkdir()
    _pictures(home)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=120)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, f"{wheel}[parity]"], check=True, timeout=600)
    expected = TRANSCRIPT.read_text()
    commands = commands_in(expected)
    assert len(commands) >= 20
    seen = transcript_of(commands, bin_folder=environment / "bin", folder=home)
    assert seen == expected


def test_figures_are_masked_and_words_are_not() -> None:
    shown = (
        '  one image   256  1.5e-06   0.9999999  pass\n"size_bytes": 12\n0.1.0 in 28.4 MB, 1.24 s\n'
    )
    assert masked(shown) == (
        '  one image   256 <figure> <figure>  pass\n"size_bytes": <size>\n<version> in <size>, <time>\n'
    )
    assert masked(shown.replace("pass", "FAIL")) != masked(shown)  # the control
    assert masked(shown.replace("256", "257")) != masked(shown)


def test_how_far_a_step_is_is_left_out() -> None:
    lines = "running x ...\nrunning x: 3 of 20, 15 s, about 1 min 5 s left\nbuilding: 2 min\n"
    assert masked(lines) == "running x ...\n"
    assert masked("error: x: 3 of 20\n") == "error: x: 3 of 20\n"  # the control
