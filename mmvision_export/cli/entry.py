"""The `mmvision` script: says what to install where the command line's own packages are missing."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from mmvision_export.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"error: {error.name} is not installed, which the mmvision command needs",
            file=sys.stderr,
        )
        print(
            "hint: pip install typer rich; python -m mmvision_export.run works without them",
            file=sys.stderr,
        )
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
