"""Run a pack on this machine's GPU: `python3 PACK`, or `python -m mmvision_export.verify_gpu run PACK`."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from mmvision_export.core.errors import BackendError, MmvisionError, print_error
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.cuda_driver import CudaDriver
from mmvision_export.verify_gpu.check import check_kernels
from mmvision_export.verify_gpu.findings import Findings
from mmvision_export.verify_gpu.machine import is_stand_in, machine_facts
from mmvision_export.verify_gpu.pack_file import Pack

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run a pack, print each finding, and write `verify-gpu.json` and `verify-gpu.md`.

    Args:
        argv: Arguments without the program's name.

    Returns:
        0 if nothing failed, 1 if something did or nothing could be run, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog="verify-gpu", description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--device", type=int, default=0, help="CUDA device (default: 0)")
    parser.add_argument(
        "--driver", metavar="FILE", help="the driver's library (default: libcuda.so.1)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(), help="folder for the two files (default: here)"
    )
    arguments = parser.parse_args(argv)
    try:
        pack = Pack.read(arguments.pack)
        driver = _driver(arguments.driver)
        cuda = Cuda(arguments.device, driver)
        arguments.output.mkdir(parents=True, exist_ok=True)
        findings = Findings(machine_facts(cuda), is_stand_in(cuda))
        try:
            check_kernels(pack, arguments.pack, cuda, findings)
            findings.is_complete = True
        finally:
            files = findings.write(arguments.output)
    except MmvisionError as error:
        print_error(error.message, error.hint)
        return 1
    except OSError as error:
        print_error(f"{error.filename or arguments.output}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        print_error(f"interrupted; the findings so far are in {arguments.output}")
        return 130
    print(f"{findings.summary}: {', '.join(map(str, files))}")
    return 1 if findings.failed else 0


def _driver(path: str | None) -> CudaDriver | None:
    if path is None:
        return None
    try:
        return CudaDriver(ctypes.CDLL(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
