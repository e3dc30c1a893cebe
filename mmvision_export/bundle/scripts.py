"""The scripts of a bundle: what a target needs is filled in where the bundle is made."""

from __future__ import annotations

import shlex
from string import Template

from mmvision_export.artifacts.deployment import Deployment
from mmvision_export.artifacts.library_record import Machine

__all__ = ["install_script", "readme", "verify_script"]

_INSTALL = Template(
    r"""#!/bin/sh
# Installs mmvision-export and what $title needs into .venv, beside this file.
#   PYTHON=python3.12 ./install.sh    chooses the interpreter
set -eu
cd "$$(dirname "$$0")"
fail() {
    echo "error: $$1" >&2
    echo "hint: $$2" >&2
    exit 1
}
python=$${PYTHON:-python3}
$machine_check
command -v "$$python" > /dev/null || fail "there is no $$python" "name an interpreter: PYTHON=python3.12 ./install.sh"
"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' ||
    fail "Python 3.10 to 3.13 is needed, $$python is $$("$$python" -V)" "name one: PYTHON=python3.12 ./install.sh"
if [ -f .venv/installed ]; then
    echo "$$PWD/.venv is installed"
    exit 0
fi
sha256sum --check --quiet SHA256SUMS || fail "the files that are named above are damaged" "copy the bundle again"
rm -rf .venv
"$$python" -m venv$system_packages .venv ||
    fail "$$python makes no virtual environment" "on Debian and Ubuntu: sudo apt install python3-venv"
$pins
# shellcheck disable=SC2086 # $$pins is a list of words
.venv/bin/python -m pip install --disable-pip-version-check --quiet $sources $$pins $wheel ||
    fail "pip could not install the packages" "$pip_hint"
$tensorrt_check
touch .venv/installed
echo "installed into $$PWD/.venv; next: ./verify.sh"
"""
)

_VERIFY = Template(
    r"""#!/bin/sh
# Checks every file of this bundle, and its embeddings on this machine. Installs first if need be.
set -eu
cd "$$(dirname "$$0")"
[ -f .venv/installed ] || ./install.sh
exec .venv/bin/mmvision verify . --run $options "$$@"
"""
)

_README = Template(
    """\
MiniMax-M3 vision encoder, $model, for $title
mmvision-export $version

    ./install.sh     installs the packages of wheels/ into .venv$network
    ./verify.sh      checks every file, and the embeddings on this machine$builds

Then:

    .venv/bin/mmvision run --model model$trust --image photo.jpg --output photo.npy

BUNDLE.json lists every file with its hash. The scripts, the wheel, the libraries and the engines are
code: run them only if you trust who gave you this bundle.
"""
)


def install_script(
    deployment: Deployment, machine: Machine | None, wheel: str, *, has_all_wheels: bool
) -> bytes:
    """`install.sh`.

    Args:
        deployment: The target.
        machine: Its CPU; None for any.
        wheel: File name of this package's wheel.
        has_all_wheels: Whether the bundle has every package that is needed, and no index is asked.
    """
    check = (
        f'[ "$(uname -m)" = {machine} ] || fail "this bundle is for {machine}, this machine is $(uname -m)" '
        f'"make one with: mmvision bundle --target {deployment.name} --machine $(uname -m)"'
    )
    pins = "pins="
    if deployment.has_system_tensorrt:
        # JetPack 6's own modules are compiled for NumPy 1. This ONNX Runtime is the last with wheels for
        # Python 3.10 (constraints-jetpack6.txt).
        pins = (
            "pins=\n"
            "[ \"$(.venv/bin/python -c 'import sys; print(sys.version_info[1])')\" != 10 ] || "
            'pins="numpy<2 onnxruntime==1.23.2"'
        )
    tensorrt = (
        ".venv/bin/python -c 'import tensorrt' 2> /dev/null ||\n"
        '    fail "this Python has no TensorRT" '
        '"sudo apt install python3-libnvinfer, then run ./install.sh again"'
    )
    return _INSTALL.substitute(
        title=deployment.title,
        machine_check=check if machine is not None else "",
        system_packages=" --system-site-packages" if deployment.has_system_tensorrt else "",
        pins=pins,
        sources="--no-index --find-links wheels" if has_all_wheels else "--find-links wheels",
        wheel=shlex.quote(f"./wheels/{wheel}[{','.join(deployment.extras)}]"),
        pip_hint=(
            "the wheels of this bundle are for another Python or CPU: make the bundle again with --wheels"
            if has_all_wheels
            else "without a network: make the bundle with --wheels and a folder of packages"
        ),
        tensorrt_check=tensorrt if deployment.has_system_tensorrt else "",
    ).encode()


def verify_script(deployment: Deployment) -> bytes:
    """`verify.sh`."""
    options = "--build --trust" if deployment.tensorrt is not None else ""
    return _VERIFY.substitute(options=options).encode()


def readme(
    deployment: Deployment, *, model: str, version: str, has_all_wheels: bool, has_engine: bool
) -> bytes:
    """`README.txt`."""
    is_gpu = deployment.tensorrt is not None
    return _README.substitute(
        title=deployment.title,
        model=model,
        version=version,
        network="" if has_all_wheels else "; what they require comes from pip's index",
        builds="; builds an engine first if none fits" if is_gpu else "",
        trust=" --trust" if has_engine else "",
    ).encode()
