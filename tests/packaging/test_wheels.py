"""Can each extra be installed where the README says, and for which CUDA?

uv resolves for a platform and a Python that are not here. Nothing is downloaded but metadata.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dockerfiles import instructions_of, pip_requirement

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
# glibc 2.35 is Ubuntu 22.04's, and so JetPack 6's.
X86, ARM = "x86_64-manylinux_2_35", "aarch64-manylinux_2_35"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(UV is None, reason="uv is not installed")]


def _resolved(
    source: str,
    *,
    platform: str,
    python: str,
    extra: str | list[str] | None = None,
    constraints: Path | None = None,
    wheels_only: bool = True,
) -> dict[str, str]:
    """Package -> version, as uv resolves a pyproject.toml, with one extra or several, or one requirement.

    Raises:
        AssertionError: There is no such set of wheels.
    """
    command = [str(UV), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python-platform", platform, "--python-version", python]
    for name in [extra] if isinstance(extra, str) else extra or ():
        command += ["--extra", name]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    if wheels_only:
        command += ["--only-binary", ":all:"]
    is_file = source.endswith(".toml")
    result = subprocess.run(
        [*command, source if is_file else "-"],
        input=None if is_file else source,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "UV_SYSTEM_CERTS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = (line.partition(" ;")[0] for line in result.stdout.splitlines() if "==" in line)
    return dict(line.split("==") for line in lines)


def _cuda_majors(packages: dict[str, str]) -> set[int]:
    """CUDA majors that packages bring, by their names or, of CUDA's own bindings, their version."""
    named = {int(m[1]) for name in packages if (m := re.search(r"-cu(\d\d)\b", name))}
    own = (version for name, version in packages.items() if name in ("cuda-bindings", "cuda-core"))
    return named | {int(version.partition(".")[0]) for version in own}


# What runs on the target: none of it may bring a CUDA of its own, but the extras that are named for
# one.
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", [X86, ARM])
@pytest.mark.parametrize("extra", ["cpu", "embed", "engine", "openvino", "plugins", "ray", "video"])
def test_extras_for_every_machine_have_wheels_and_bring_no_cuda(
    extra: str, platform: str, python: str
) -> None:
    packages = _resolved("pyproject.toml", extra=extra, platform=platform, python=python)
    assert not _cuda_majors(packages), packages


@pytest.mark.parametrize("python", ["3.10", "3.13"])
@pytest.mark.parametrize("platform", [X86, ARM])
@pytest.mark.parametrize("extra", ["export", "parity"])
def test_extras_of_a_build_machine_have_wheels(extra: str, platform: str, python: str) -> None:
    packages = _resolved("pyproject.toml", extra=extra, platform=platform, python=python)
    assert "torch" in packages


@pytest.mark.parametrize(
    ("extra", "platform", "cuda"),
    [
        ("tensorrt-cu12", X86, 12),
        ("tensorrt-cu13", X86, 13),
        ("tensorrt-cu13", "aarch64-manylinux_2_39", 13),
        ("rtx-cu12", X86, 12),
        ("rtx", X86, 13),
        ("rtx", "aarch64-manylinux_2_39", 13),
    ],
)
def test_an_extra_named_for_a_cuda_brings_that_one(extra: str, platform: str, cuda: int) -> None:
    # TensorRT's own package is a small sdist that fetches wheels from NVIDIA's index.
    packages = _resolved(
        "pyproject.toml", extra=extra, platform=platform, python="3.12", wheels_only=False
    )
    assert _cuda_majors(packages) == {cuda}, packages


@pytest.mark.parametrize("extra", ["cpu", "embed", "engine", "plugins", "video"])
def test_jetpack_6_keeps_its_numpy(extra: str) -> None:
    packages = _resolved(
        "pyproject.toml",
        extra=extra,
        platform=ARM,
        python="3.10",
        constraints=ROOT / "constraints-jetpack6.txt",
    )
    assert packages["numpy"].startswith("1.26.")


# The platform is the image's release of Ubuntu or Debian, and the Python is the one that it has.
@pytest.mark.parametrize(
    ("dockerfile", "platform", "python", "brings"),
    [
        ("python", "x86_64-manylinux_2_36", "3.12", "onnxruntime"),
        ("python", "aarch64-manylinux_2_36", "3.12", "onnxruntime"),
        ("jetpack6", ARM, "3.10", "triton"),
        ("tensorrt", "x86_64-manylinux_2_39", "3.12", "triton"),
        ("tensorrt", "aarch64-manylinux_2_39", "3.12", "triton"),
    ],
)
def test_an_images_packages_have_wheels_and_bring_no_cuda(
    dockerfile: str, platform: str, python: str, brings: str
) -> None:
    path = ROOT / "docker" / f"{dockerfile}.Dockerfile"
    extras, constraints = pip_requirement(instructions_of(path))
    assert constraints is not None
    packages = _resolved(
        "pyproject.toml",
        extra=extras,
        platform=platform,
        python=python,
        constraints=ROOT / constraints,
    )
    assert brings in packages
    assert not _cuda_majors(packages), packages


def test_control_a_bare_requirement_of_cudas_bindings_is_seen_to_bring_cuda_13() -> None:
    # What this project required until it called the driver itself.
    packages = _resolved("cuda-bindings>=12.6", platform=ARM, python="3.10")
    assert _cuda_majors(packages) == {13}


def test_control_what_has_no_wheel_is_refused() -> None:
    with pytest.raises(AssertionError):
        _resolved("tensorrt-rtx-cu12>=1.5", platform=ARM, python="3.12")
