"""Small bundles, in memory."""

from __future__ import annotations

from collections.abc import Mapping

from mmvision_export.bundle.record import BundleRecord
from mmvision_export.core.files import FileRecord


def bundle_record(content: Mapping[str, bytes]) -> BundleRecord:
    """The record of a bundle for a CPU with these files."""
    return BundleRecord(
        target="cpu",
        machine=None,
        model="small",
        version="0",
        precision="fp32",
        build=[],
        sample_graph="model.onnx",
        files={name: FileRecord.of(data) for name, data in content.items()},
    )
