"""A bundle in an empty directory, with an empty environment, installs and verifies itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmvision_export.artifacts.deployment import DEPLOYMENTS
from mmvision_export.bundle.scripts import install_script, verify_script

SHELLCHECK = shutil.which("shellcheck")


def run(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With nothing of this process's environment but the settings of pip."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return subprocess.run(
        [str(script)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(script.parent.parent), **kept, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture
def unpacked(cpu_archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(cpu_archive) as archive:
        archive.extractall(tmp_path, filter="tar")
    return tmp_path / cpu_archive.stem


@pytest.mark.slow
def test_a_bundle_verifies_itself(unpacked: Path) -> None:
    result = run(unpacked / "verify.sh", PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "PASSED: onnxruntime-cpu, model.cpu.onnx" in result.stdout
    weights = unpacked / "model" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    damaged = run(unpacked / "verify.sh")
    assert damaged.returncode == 1
    assert "model/model.onnx.data" in damaged.stderr
    assert "PASSED" not in damaged.stdout


def test_damage_is_named_before_anything_is_installed(unpacked: Path) -> None:
    wheel = next((unpacked / "wheels").iterdir())
    content = bytearray(wheel.read_bytes())
    content[-1] ^= 1
    wheel.write_bytes(content)
    result = run(unpacked / "verify.sh", PYTHON=sys.executable)
    assert result.returncode == 1
    assert f"wheels/{wheel.name}" in result.stdout
    assert "error: " in result.stderr
    assert not (unpacked / ".venv").exists()


def test_an_interpreter_that_is_none_is_refused(unpacked: Path) -> None:
    result = run(unpacked / "install.sh", PYTHON="python-that-is-not-there")
    assert result.returncode == 1
    assert "there is no python-that-is-not-there" in result.stderr


def test_a_bundle_for_another_cpu_is_refused(tmp_path: Path) -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    script = tmp_path / "install.sh"
    script.write_bytes(
        install_script(DEPLOYMENTS["dgpu"], other, "x.whl", has_all_wheels=False)  # type: ignore[arg-type]
    )
    script.chmod(0o755)
    result = run(script)
    assert result.returncode == 1
    assert other in result.stderr


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("has_all_wheels", [False, True])
def test_every_script_is_one(tmp_path: Path, name: str, has_all_wheels: bool) -> None:
    row = DEPLOYMENTS[name]  # type: ignore[index]
    machine = row.machines[0] if row.tensorrt else None
    for content in (
        install_script(row, machine, "x.whl", has_all_wheels=has_all_wheels),
        verify_script(row),
    ):
        script = tmp_path / "script.sh"
        script.write_bytes(content)
        assert b"$title" not in content
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
        if SHELLCHECK:
            subprocess.run([SHELLCHECK, script], check=True)
