"""`python -m mmvision_export.verify_gpu pack --output DIR`, and `run DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmvision_export.core.command import exit_code_of
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.verify_gpu.run import main as run_main

__all__ = ["main"]


def main() -> int:
    """Make a pack or run one."""
    if sys.argv[1:2] == ["run"]:
        return run_main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="verify-gpu", description=__doc__)
    parser.add_argument("command", choices=["pack", "run"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sm", nargs="+", default=[], help="GPUs, as 89 or 8.9 (default: all)")
    parser.add_argument("--head-dim", type=int, default=80)
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args()

    def work() -> int:
        from mmvision_export.verify_gpu.pack import write_pack

        size = write_pack(
            arguments.output,
            compute_capabilities=[ComputeCapability.parse(sm) for sm in arguments.sm],
            head_dim=arguments.head_dim,
            force=arguments.force,
        )
        print(f"{arguments.output}: {size / 1e6:.1f} MB; on the GPU: python3 {arguments.output}")
        return 0

    return exit_code_of(work, verbose=False)


if __name__ == "__main__":
    sys.exit(main())
