"""What an engine is built for, and the file name that says it."""

from __future__ import annotations

from typing import Any

import pytest

from mmvision_export.artifacts.build_target import BuildTarget, TensorRTVersion
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import ManifestError


def test_file_names() -> None:
    target = BuildTarget(
        backend="tensorrt-rtx",
        tensorrt_version=TensorRTVersion("1.7.1.116"),
        platform="linux-x86_64",
        compute_capabilities=(ComputeCapability(8, 6), ComputeCapability(12, 0)),
        precision="fp16",
        opset=23,
    )
    assert target.engine_name == "tensorrt-rtx-1.7.1.116-sm86-120-fp16.engine"


def test_releases_are_ordered_as_numbers() -> None:
    """As text or as a float, 10.3 would come after 10.14."""
    texts = ["1.7.1.116", "8.6.1", "10.3.0.30", "10.14.1.48", "11.0.0.114"]
    releases = [TensorRTVersion(text).release for text in texts]
    assert releases == sorted(releases) == [(1, 7), (8, 6), (10, 3), (10, 14), (11, 0)]
    assert sorted(texts) != texts


def test_another_build_is_another_version() -> None:
    assert TensorRTVersion("10.3.0.26") != TensorRTVersion("10.3.0.30")
    assert TensorRTVersion("10.3.0.26").release == TensorRTVersion("10.3.0.30").release


@pytest.mark.parametrize("value", ["", "latest", "10", "v10.3", 10.3, None])
def test_what_is_no_version(value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        TensorRTVersion.from_json(value)
    assert repr(value) in str(caught.value)
