"""The `mmvision` command."""
