"""`python -m mmvision_export` is the `mmvision` command."""

from __future__ import annotations

from mmvision_export.cli.entry import main

if __name__ == "__main__":
    main()
