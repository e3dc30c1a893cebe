"""The Dockerfiles: their rules, the packages that they install, and the files that they are built from.

No image is built: a registry of images cannot be reached from where the tests run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.dockerfiles import (
    copied_from_context,
    instructions_of,
    is_ignored,
    pip_requirement,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)


def faults_of(dockerfile: Path) -> list[str]:
    """Rules of ours that it breaks."""
    instructions = instructions_of(dockerfile)
    texts: dict[str, list[str]] = {}
    for each in instructions:
        texts.setdefault(each.name, []).append(each.text)
    defaults = dict(text.split("=", 1) for text in texts.get("ARG", []) if "=" in text)
    faults = []
    for base in texts["FROM"]:
        image = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], base.split()[0])
        if not re.search(r":[^:/]*\d[^:/]*$", image) or image.endswith("latest"):
            faults.append(f"{image} is not pinned")
    users = texts.get("USER", ["root"])
    if users[-1] in ("root", "0") or defaults.get("UID") == "0":
        faults.append("it runs as root")
    if "ADD" in texts:
        faults.append("ADD may fetch from an address that is not pinned")
    secret = re.compile(r"token|password|secret|key", re.I)
    variables = (*texts.get("ENV", []), *texts.get("ARG", []))
    faults += [f"a secret stays in the image: {text}" for text in variables if secret.search(text)]
    if any(text.split()[0] == "." for text in texts.get("COPY", [])):
        faults.append("COPY . takes all that lies there")
    if any("sudo " in text for text in texts.get("RUN", [])):
        faults.append("sudo")
    return faults


@each_dockerfile
def test_it_keeps_our_rules(dockerfile: Path) -> None:
    assert faults_of(dockerfile) == []


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("FROM", "FROM python"),
        ("FROM", "FROM python:latest"),
        ("FROM", "FROM nvcr.io:443/nvidia/l4t-jetpack"),
        ("USER", "USER root"),
        ("USER", ""),
        ("WORKDIR", "ADD https://example.org/x.tar /x"),
        ("WORKDIR", "ENV HF_TOKEN=x"),
        ("WORKDIR", "COPY . /source"),
        ("WORKDIR", "RUN sudo true"),
    ],
)
def test_control_a_broken_rule_is_found(tmp_path: Path, line: str, instead: str) -> None:
    text = (FOLDER / "jetpack6.Dockerfile").read_text()
    broken = tmp_path / "x.Dockerfile"
    broken.write_text(re.sub(rf"^{line} .*$", instead, text, flags=re.M))
    assert len(set(faults_of(broken))) == 1


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: make setup")
@each_dockerfile
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    assert hadolint(dockerfile) == ""


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: make setup")
def test_control_hadolint_finds_a_fault(tmp_path: Path) -> None:
    broken = tmp_path / "x.Dockerfile"
    broken.write_text("FROM debian:12.1\nRUN cd /tmp && apt-get install x\n")
    assert "DL3003" in hadolint(broken)


def hadolint(path: Path) -> str:
    ended = subprocess.run(
        [str(HADOLINT), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    assert not ended.stderr
    return ended.stdout


def context() -> list[str]:
    """Patterns of `.dockerignore`."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@each_dockerfile
def test_what_is_copied_is_there_and_is_let_through(dockerfile: Path) -> None:
    copied = list(copied_from_context(instructions_of(dockerfile)))
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not is_ignored(path, context()), path


@pytest.mark.parametrize(
    "path",
    [
        ".git",
        ".venv",
        ".env",
        "engines/x/model.onnx",
        "photo.jpg",
        "id_ed25519",
        "docker",
        "mmvision_export/core/__pycache__",
    ],
)
def test_what_no_image_needs_stays_outside(path: str) -> None:
    assert is_ignored(path, context())
    assert not is_ignored(path, [])  # the control


@pytest.mark.slow
def test_what_all_of_them_copy_is_enough_for_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copied = [set(copied_from_context(instructions_of(path))) for path in DOCKERFILES]
    for path in set.intersection(*copied):
        if (ROOT / path).is_dir():
            shutil.copytree(
                ROOT / path, source / path, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / path, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"mmvision_export/py.typed", "mmvision_export/_plugins/CMakeLists.txt"} <= names


def test_the_readme_has_each_with_a_command_that_builds_it() -> None:
    text = (FOLDER / "README.md").read_text()
    for dockerfile in DOCKERFILES:
        assert f"docker build -f docker/{dockerfile.name} " in text
    named = {name.removeprefix("docker/") for name in re.findall(r"docker/\S+\.Dockerfile", text)}
    assert named == {path.name for path in DOCKERFILES}


def test_extras_and_constraints_are_read() -> None:
    assert pip_requirement(instructions_of(FOLDER / "jetpack6.Dockerfile")) == (
        ["cpu", "engine", "plugins", "video"],
        "constraints-jetpack6.txt",
    )
    assert pip_requirement(instructions_of(FOLDER / "python.Dockerfile")) == (
        ["cpu", "video"],
        "constraints.txt",
    )
