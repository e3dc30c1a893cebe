"""Which GPU is in which kind of machine."""

from __future__ import annotations

import pytest

from mmvision_export.artifacts.deployment import DEPLOYMENTS
from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.kernels.resources import ARCHITECTURES


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_gpu_that_has_kernels_is_in_one_kind_of_tensorrt_machine(
    capability: ComputeCapability,
) -> None:
    rows = [
        row.name
        for row in DEPLOYMENTS.values()
        if row.tensorrt == "tensorrt" and row.has_gpu(capability)
    ]
    assert len(rows) == 1
    assert not DEPLOYMENTS["cpu"].has_gpu(capability)


def test_a_jetson_has_its_own() -> None:
    assert DEPLOYMENTS["jetson-orin"].has_gpu(ComputeCapability(8, 7))
    assert DEPLOYMENTS["jetson-thor"].has_gpu(ComputeCapability(11, 0))
    assert not DEPLOYMENTS["dgpu"].has_gpu(ComputeCapability(8, 7))
    assert not DEPLOYMENTS["rtx"].has_gpu(ComputeCapability(11, 0))
