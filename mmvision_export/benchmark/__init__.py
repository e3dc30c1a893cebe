"""The `mmvision benchmark` command.

What runs a model directory, and PyTorch implementations of others, measured side by side.
"""

from __future__ import annotations
