"""Check the TensorRT backends with mypy against TensorRT's type stubs.

`python scripts/check_tensorrt_types.py`.

The stubs are installed into a folder of their own: in site-packages their folder named `tensorrt`
would pass for TensorRT itself. Those of 10.13 have syntax that no parser takes, parameters named
`in` among it; that is repaired.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

STUBS = Path(__file__).parents[1] / ".mypy_cache" / "tensorrt-stubs-10.13.0.35.1"
BINDINGS = STUBS / "tensorrt_bindings" / "tensorrt.pyi"


def main() -> int:
    """Install and repair the stubs if they are not there, and run mypy."""
    if not BINDINGS.is_file():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            str(STUBS),
        ]
        subprocess.run([*pip, "tensorrt-stubs==10.13.0.35.1"], check=True)
        (STUBS / "tensorrt_libs.pyi").touch()
        text = BINDINGS.read_text(encoding="utf-8")
        text = re.sub(r"\bin: list\[", "in_: list[", text)
        text = text.replace(
            "power: Weights = None, channel_axis: int)",
            "power: Weights = None, channel_axis: int = ...)",
        )
        BINDINGS.write_text(text, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": str(STUBS)}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--cache-dir",
        str(STUBS / "cache"),
    ]
    for module in (
        "runtime.backends.engines",
        "runtime.backends.engine_weights",
        "engine.builder_config",
        "engine.timing_cache",
        "engine.layer_report",
    ):
        command += ["-m", f"mmvision_export.{module}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    # The stubs' own faults are not ours, unless they kept mypy from looking at ours (exit code 2).
    ours = [line for line in lines if result.returncode == 2 or line.startswith("mmvision_export")]
    print("\n".join(ours) or "TensorRT's API is called as its type stubs have it")
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
