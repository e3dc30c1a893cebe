"""Kernels compiled ahead of time: real cubins for every architecture, made with no GPU, and what is in them."""

from __future__ import annotations

from typing import Any

import pytest

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import PluginError
from mmvision_export.kernels.compile import (
    DTYPES,
    HEAD_DIMS,
    PORTABLE_PTX,
    compile_kernels,
    compile_varlen_attention,
    kernel_module,
)
from mmvision_export.kernels.resources import ARCHITECTURES, CompiledKernel, Tile, resource_table

pytest.importorskip("triton", reason="triton is not installed")


def check(kernels: list[CompiledKernel]) -> None:
    for kernel in kernels:
        architecture = ARCHITECTURES[kernel.compute_capability]
        assert kernel.cubin[:4] == b"\x7fELF"
        # PTX 8 is CUDA 12's, and so is the assembler that took it: what it makes runs with the drivers of CUDA 12.
        assert f".version {architecture.cuda - 4}." in kernel.ptx
        assert kernel.target.rstrip("a") == f"sm_{kernel.compute_capability.sm}"
        assert kernel.spills == 0
        assert kernel.registers <= 255
        assert kernel.shared_bytes <= architecture.shared_per_block_bytes
        assert kernel.occupancy > 0
        # The right generation of tensor-core instructions, and no other.
        expected = {architecture.tensor_core} if kernel.op == "varlen_attention" else set()
        assert set(kernel.tensor_core) == expected


def test_released_head_dim_on_every_architecture() -> None:
    kernels = list(compile_kernels(list(ARCHITECTURES), [80]))
    check(kernels)
    assert [(k.compute_capability, k.dtype, k.head_dim) for k in kernels] == [
        (capability, dtype, head_dim)
        for capability in ARCHITECTURES
        for dtype in DTYPES
        for head_dim in (80, 0)
    ]
    assert kernels[0].function == "varlen_attention_kernel"
    portable = next(kernel for kernel in kernels if kernel.compute_capability == PORTABLE_PTX)
    assert portable.target == "sm_80"  # and not sm_80a, whose PTX would run on no other GPU


@pytest.mark.slow
def test_every_kernel() -> None:
    kernels = list(compile_kernels(list(ARCHITECTURES), HEAD_DIMS))
    check(kernels)
    assert len(kernels) == 8 * 2 * (8 + 1)


def kernel(**changes: Any) -> CompiledKernel:
    fields: dict[str, Any] = {
        "op": "varlen_attention", "compute_capability": ComputeCapability(8, 9), "dtype": "fp16",
        "head_dim": 80, "tile": Tile(128, 64, 8, 2), "rows": 128, "function": "f", "num_warps": 8,
        "shared_bytes": 40 * 1024, "registers": 128, "spills": 0, "tensor_core": {"HMMA": 80},
        "cubin": b"", "ptx": "",
    }  # fmt: skip
    return CompiledKernel(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 2),  # 128 registers x 256 threads: two blocks fill the register file
        ({"registers": 129}, 1),  # handed out in steps of 8 per thread
        ({"registers": 32}, 2),  # shared memory: 41 KB each of 100 KB
        ({"registers": 32, "shared_bytes": 0}, 6),  # 48 warps, 8 to a block
        ({"compute_capability": ComputeCapability(9, 0), "registers": 32, "shared_bytes": 0}, 8),
    ],
)
def test_occupancy_by_hand(changes: dict[str, Any], blocks: int) -> None:
    assert kernel(**changes).blocks_per_sm == blocks


def test_arithmetic_of_one_step() -> None:
    assert kernel().flops_per_step == 2 * 2 * 128 * 64 * 80
    assert kernel().bytes_per_step == 64 * 80 * 2 * 2  # keys and values, two bytes each


def test_table() -> None:
    table = resource_table(
        [kernel(), kernel(op="qk_rotary_embedding", head_dim=0, tile=None, tensor_core={})]
    )
    assert (
        "| varlen_attention | 89 (RTX 40, L4, L40) | fp16 | 80 | 128 x 64, 8 warps | 128 | 0 | 40.0 | 33% |"
        in table
    )
    assert "| any | 8 warps |" in table


def test_refusals() -> None:
    with pytest.raises(PluginError, match="TRITON_INTERPRET is set"):
        compile_varlen_attention(ComputeCapability(8, 9), "fp16", 80)
    with pytest.raises(PluginError, match="no such kernel"):
        kernel_module("flash_mla")
