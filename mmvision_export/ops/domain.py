"""The custom operators' domain and version, which are also the TensorRT plugins'."""

from __future__ import annotations

__all__ = ["DOMAIN", "OP_VERSION", "PLUGIN_ATTRIBUTES"]

DOMAIN = "mmvision"
OP_VERSION = 1

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
"""Attributes of every node: TensorRT's parser looks a plugin up by them, others ignore them."""
