"""Where a model is deployed: the machines that commands know by name, one row each."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mmvision_export.artifacts.build_target import TensorRTName
from mmvision_export.artifacts.library_record import MACHINES, Machine
from mmvision_export.core.compute_capability import ComputeCapability

__all__ = ["DEPLOYMENTS", "Deployment", "DeploymentName"]

DeploymentName = Literal["cpu", "rtx", "dgpu", "jetson-orin", "jetson-thor"]

_ORIN = (ComputeCapability(8, 7),)
# CUDA 13 calls Thor 11.0, CUDA 12 calls it 10.1.
_THOR = (ComputeCapability(10, 1), ComputeCapability(11, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """One kind of machine.

    Attributes:
        name: On the command line.
        title: In sentences.
        machines: CPUs that it may have, the usual one first.
        tensorrt: The TensorRT that runs engines there; None where none does.
        capabilities: Its GPUs; empty where it may have any that is no Jetson's.
        extras: What of this package is installed there.
        has_system_tensorrt: Whether TensorRT comes with the system, as with JetPack, and not from pip.
    """

    name: DeploymentName
    title: str
    machines: tuple[Machine, ...]
    tensorrt: TensorRTName | None = None
    capabilities: tuple[ComputeCapability, ...] = ()
    extras: tuple[str, ...] = ("cpu",)
    has_system_tensorrt: bool = False

    def has_gpu(self, capability: ComputeCapability) -> bool:
        """Whether a GPU of this compute capability may be in such a machine."""
        if self.tensorrt is None:
            return False
        if self.capabilities:
            return capability in self.capabilities
        return capability not in (*_ORIN, *_THOR)


DEPLOYMENTS: dict[DeploymentName, Deployment] = {
    row.name: row
    for row in (
        Deployment(name="cpu", title="a CPU", machines=MACHINES),
        Deployment(
            name="rtx",
            title="an RTX GPU with TensorRT-RTX",
            machines=("x86_64", "aarch64"),
            tensorrt="tensorrt-rtx",
            extras=("cpu", "rtx"),
        ),
        Deployment(
            name="dgpu",
            title="a data-centre GPU with TensorRT",
            machines=("x86_64", "aarch64"),
            tensorrt="tensorrt",
            extras=("cpu", "tensorrt"),
        ),
        Deployment(
            name="jetson-orin",
            title="a Jetson Orin",
            machines=("aarch64",),
            tensorrt="tensorrt",
            capabilities=_ORIN,
            extras=("cpu", "engine"),
            has_system_tensorrt=True,
        ),
        Deployment(
            name="jetson-thor",
            title="a Jetson Thor",
            machines=("aarch64",),
            tensorrt="tensorrt",
            capabilities=_THOR,
            extras=("cpu", "engine"),
            has_system_tensorrt=True,
        ),
    )
}
"""In the order of the command's help."""

assert tuple(DEPLOYMENTS) == get_args(DeploymentName)
