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
from mmvision_export.kernels.sass import Sass, sass_from_cubin
from tests.support.cubin import entry_from_cubin

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
        check_code(kernel)
        check_launch(kernel)


def check_code(kernel: CompiledKernel) -> None:
    """What stands in the code, as the disassembler prints it."""
    sass = sass_from_cubin(kernel.cubin)
    assert (sass.registers, sass.spills) == (kernel.registers, kernel.spills)
    accesses = sass.global_accesses
    if kernel.op == "varlen_attention":
        assert not any(access.endswith((" 8", " 16")) for access in accesses), accesses
        assert accesses["STG 128"] > 0
        # A program of an empty segment at the end loads one element of cu_seqlens and returns: no
        # other load is moved in front of that. What it loads is counted in test_idle_programs.py.
        assert sass.loads_before_branch == 1
    else:
        assert accesses["LDG 16"] > 0  # the control: 39 is odd, and halves of a head lie anyhow


def check_launch(kernel: CompiledKernel) -> None:
    """What the binary says of its entry, against what the launch gives it."""
    entry = entry_from_cubin(kernel.cubin)
    assert entry.function == kernel.function
    assert entry.threads == 32 * kernel.num_warps
    assert entry.registers == kernel.registers
    assert entry.registers * entry.threads <= 65536
    assert entry.frame_bytes == 0  # no local memory, by another word than that of the code
    # All shared memory is asked for at the launch.
    assert entry.static_shared_bytes <= 1024
    limit = ARCHITECTURES[kernel.compute_capability].shared_per_block_bytes
    assert entry.static_shared_bytes + kernel.shared_bytes <= limit
    pointer, word, scratch = 8, 4, (8, 8)
    if kernel.op == "varlen_attention":
        assert entry.parameter_bytes == (*[pointer] * 5, *[word] * 4, *scratch)
    else:
        assert entry.parameter_bytes == (*[pointer] * 6, *[word] * 4, *scratch)


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
    # One of attention a head size, and one that rotates.
    assert len(kernels) == len(ARCHITECTURES) * len(DTYPES) * (len(HEAD_DIMS) + 1)


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


LISTING = """
        .section .text.kernel
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @UP1 EXIT ;
        /*0030*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R4.64] ;
        /*0040*/                   LDG.E.LTC128B.128 R4, desc[UR4][R4.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R4.64] ;
        /*0060*/                   HGMMA.64x80x16.F32 R24, gdesc[UR8], R24 ;
        /*0070*/                   STL.64 [R1], R2 ;
        /*0080*/                   STG.E.64 desc[UR4][R4.64], R2 ;
        /*0090*/                   EXIT ;
"""


def test_a_listing_by_hand() -> None:
    """Controls: an access of 16 bits, a spill, and loads after a branch are told from the others."""
    sass = Sass.from_listing(LISTING, registers=32)
    assert len(sass.instructions) == 10
    assert sass.global_accesses == {
        "LDG 32": 1, "LDG 16": 1, "LDG 128": 1, "LDGSTS 128": 1, "STG 64": 1,
    }  # fmt: skip
    assert sass.loads_before_branch == 1
    assert sass.spills == 1
    assert sass.tensor_core == {"HGMMA": 1}
    late = LISTING.replace("@UP1 EXIT", "NOP")
    assert Sass.from_listing(late, registers=32).loads_before_branch == 4


def test_refusals() -> None:
    with pytest.raises(PluginError, match="TRITON_INTERPRET is set"):
        compile_varlen_attention(ComputeCapability(8, 9), "fp16", 80)
    with pytest.raises(PluginError, match="no such kernel"):
        kernel_module("flash_mla")
