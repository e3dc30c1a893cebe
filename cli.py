"""`python cli.py ...` from a checkout is the `mmvision` command."""

from mmvision_export.cli.app import main

if __name__ == "__main__":
    main()
