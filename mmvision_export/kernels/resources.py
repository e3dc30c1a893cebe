"""What a compiled kernel is and what it uses: registers, spills, shared memory, occupancy, tensor-core instructions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import PluginError

__all__ = ["ARCHITECTURES", "Architecture", "CompiledKernel", "Tile", "resource_table"]

_WARP = 32
_KB = 1024
_REGISTERS_PER_SM = 65536


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One GPU architecture's limits.

    Attributes:
        compute_capability: Its generation.
        gpus: Where it is found.
        shared_per_block_bytes: Most shared memory one block can have.
        shared_per_sm_bytes: Shared memory of one multiprocessor; each block on it takes 1 KB more than it asks for.
        warps_per_sm: Most resident warps.
        tensor_core: The instruction (SASS) its matrix products have to be made of.
        cuda: First major version of CUDA that knows it, or 12 if earlier: a driver of that version loads its binaries.
        is_integrated: Whether it is in a chip with the CPU. Its binaries run on no other, and no other's on it.

    References:
        CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
    """

    compute_capability: ComputeCapability
    gpus: str
    shared_per_block_bytes: int
    shared_per_sm_bytes: int
    warps_per_sm: int
    tensor_core: str
    cuda: int = 12
    is_integrated: bool = False


ARCHITECTURES: dict[ComputeCapability, Architecture] = {
    a.compute_capability: a
    for a in (
        Architecture(ComputeCapability(8, 0), "A100", 163 * _KB, 164 * _KB, 64, "HMMA"),
        Architecture(ComputeCapability(8, 6), "RTX 30, A10, A40", 99 * _KB, 100 * _KB, 48, "HMMA"),
        Architecture(
            ComputeCapability(8, 7),
            "Jetson Orin",
            163 * _KB,
            164 * _KB,
            48,
            "HMMA",
            is_integrated=True,
        ),
        Architecture(ComputeCapability(8, 9), "RTX 40, L4, L40", 99 * _KB, 100 * _KB, 48, "HMMA"),
        Architecture(ComputeCapability(9, 0), "H100, H200", 227 * _KB, 228 * _KB, 64, "HGMMA"),
        Architecture(ComputeCapability(10, 0), "B200", 227 * _KB, 228 * _KB, 64, "UTCHMMA"),
        # CUDA 13 calls Thor 11.0; what runs with a driver of CUDA 12 calls it 10.1.
        Architecture(
            ComputeCapability(10, 1),
            "Thor, CUDA 12",
            227 * _KB,
            228 * _KB,
            48,
            "UTCHMMA",
            is_integrated=True,
        ),
        Architecture(ComputeCapability(10, 3), "B300", 227 * _KB, 228 * _KB, 64, "UTCHMMA"),
        Architecture(
            ComputeCapability(11, 0),
            "Jetson Thor",
            227 * _KB,
            228 * _KB,
            48,
            "UTCHMMA",
            cuda=13,
            is_integrated=True,
        ),
        Architecture(ComputeCapability(12, 0), "RTX 50", 99 * _KB, 100 * _KB, 48, "HMMA"),
        Architecture(
            ComputeCapability(12, 1),
            "DGX Spark",
            99 * _KB,
            100 * _KB,
            48,
            "HMMA",
            is_integrated=True,
        ),
    )
}
"""By compute capability. HMMA is `mma.sync`, HGMMA `wgmma`, UTCHMMA `tcgen05.mma`."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one program of the attention kernel is cut.

    Attributes:
        block_m: Queries.
        block_n: Keys in one step.
        num_warps: Warps of the block.
        num_stages: Steps whose keys and values are in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A cubin, what is needed to launch it, and what it uses.

    Attributes:
        op: Folder of the kernel.
        compute_capability: Architecture.
        dtype: fp16 or bf16.
        head_dim: Of the attention kernel; 0 for a kernel that serves all.
        tile: Of the attention kernel.
        rows: Patches of one program, by which the host sizes the grid.
        function: Name of the function in the cubin.
        num_warps: Warps of a block.
        shared_bytes: Dynamic shared memory to launch with.
        registers: Per thread.
        spills: Instructions that move registers to or from local memory.
        tensor_core: Tensor-core instructions by name.
        cubin: The binary.
        ptx: The assembly it was made from.
    """

    op: str
    compute_capability: ComputeCapability
    dtype: str
    head_dim: int
    tile: Tile | None
    rows: int
    function: str
    num_warps: int
    shared_bytes: int
    registers: int
    spills: int
    tensor_core: dict[str, int]
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)

    @property
    def target(self) -> str:
        """What it was compiled for: `sm_80`, or `sm_90a` with features that no other architecture has.

        A binary for `sm_80` runs on later minor versions of its architecture too, one for `sm_90a` on 9.0 only.
        """
        target = re.search(r"^\.target (\w+)", self.ptx, re.MULTILINE)
        if target is None:
            raise PluginError(
                f"{self.op} for sm_{self.compute_capability.sm} has no .target in its PTX"
            )
        return target[1]

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit one multiprocessor at once, by registers, shared memory and warps."""
        architecture = ARCHITECTURES[self.compute_capability]
        # Registers are handed out in units of 256 per warp.
        per_warp = -(-self.registers * _WARP // 256) * 256
        return min(
            _REGISTERS_PER_SM // (per_warp * self.num_warps),
            architecture.shared_per_sm_bytes // (self.shared_bytes + _KB),
            architecture.warps_per_sm // self.num_warps,
        )

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of the most there can be."""
        return (
            self.blocks_per_sm
            * self.num_warps
            / ARCHITECTURES[self.compute_capability].warps_per_sm
        )

    @property
    def flops_per_step(self) -> int:
        """Multiplications and additions of one step: two products of `block_m x block_n x head_dim`."""
        return 0 if self.tile is None else 4 * self.tile.block_m * self.tile.block_n * self.head_dim

    @property
    def bytes_per_step(self) -> int:
        """Keys and values read in one step, in bytes."""
        return 0 if self.tile is None else 2 * self.tile.block_n * self.head_dim * 2


def resource_table(kernels: Iterable[CompiledKernel]) -> str:
    """What compiled kernels use, as a Markdown table."""
    rows = [
        "| op | GPU | dtype | head_dim | tile | registers | spills | shared KB | occupancy | tensor core | FLOP/byte |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for k in kernels:
        architecture = ARCHITECTURES[k.compute_capability]
        tile = (
            f"{k.tile.block_m} x {k.tile.block_n}, {k.num_warps} warps"
            if k.tile
            else f"{k.num_warps} warps"
        )
        products = ", ".join(f"{count} {name}" for name, count in k.tensor_core.items()) or "-"
        intensity = f"{k.flops_per_step / k.bytes_per_step:.0f}" if k.tile else "-"
        rows.append(
            f"| {k.op} | {k.compute_capability.sm} ({architecture.gpus}) | {k.dtype} | {k.head_dim or 'any'} | {tile} "
            f"| {k.registers} | {k.spills} | {k.shared_bytes / _KB:.1f} | {k.occupancy:.0%} "
            f"| {products} | {intensity} |"
        )
    return "\n".join(rows)
