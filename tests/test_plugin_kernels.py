"""Kernels compiled ahead of time: real cubins for every architecture, made with no GPU, and what is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from mmvision_export.errors import PluginError
from mmvision_export.plugin_kernels import (
    ARCHITECTURES,
    PORTABLE_PTX_SM,
    CompiledKernel,
    Tile,
    compile_varlen_attention,
    kernel_module,
    resource_table,
)

pytest.importorskip("triton", reason="triton is not installed")

# In a process of its own: these tests interpret the kernels, and Triton either interprets or compiles.
PROGRAM = """
import json, re, sys
from concurrent.futures import ProcessPoolExecutor
from mmvision_export.plugin_kernels import compile_qk_rotary_embedding, compile_varlen_attention

def compiled(job):
    kernel = compile_varlen_attention(*job) if len(job) == 3 else compile_qk_rotary_embedding(*job)
    return {**{k: v for k, v in vars(kernel).items() if k not in ("cubin", "ptx", "tile")},
            "elf": kernel.cubin[:4].hex(), "target": re.search(r"\\.target (\\S+)", kernel.ptx)[1],
            "occupancy": kernel.occupancy}

if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compiled, json.loads(sys.argv[1])))))
"""


def compile_all(jobs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    kernels: list[dict[str, Any]] = json.loads(result.stdout)
    return kernels


def check(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        architecture = ARCHITECTURES[kernel["sm"]]
        assert kernel["elf"] == "7f454c46"
        assert kernel["target"].rstrip("a") == f"sm_{kernel['sm']}"
        assert kernel["spills"] == 0
        assert kernel["registers"] <= 255
        assert kernel["shared_bytes"] <= architecture.shared_per_block_bytes
        assert kernel["occupancy"] > 0
        # The right generation of tensor-core instructions, and no other.
        expected = {architecture.tensor_core} if kernel["op"] == "varlen_attention" else set()
        assert set(kernel["tensor_core"]) == expected


def test_released_head_dim_on_every_architecture() -> None:
    kernels = compile_all([(sm, "fp16", 80) for sm in ARCHITECTURES] + [(89, "bf16", 64), (87, "fp16"), (120, "bf16")])
    check(kernels)
    assert len(kernels) == len(ARCHITECTURES) + 3
    assert kernels[0]["function"] == "varlen_attention_kernel"
    portable = next(kernel for kernel in kernels if kernel["sm"] == PORTABLE_PTX_SM)
    assert portable["target"] == "sm_80"  # and not sm_80a, whose PTX would run on no other GPU


@pytest.mark.slow
def test_every_kernel() -> None:
    attention = [(sm, dtype, d) for sm in ARCHITECTURES for dtype in ("fp16", "bf16") for d in range(16, 129, 16)]
    rotary = [(sm, dtype) for sm in ARCHITECTURES for dtype in ("fp16", "bf16")]
    kernels = compile_all([*attention, *rotary])
    check(kernels)
    assert len(kernels) == 8 * 2 * (8 + 1)


def kernel(**changes: Any) -> CompiledKernel:
    fields: dict[str, Any] = {
        "op": "varlen_attention", "sm": 89, "dtype": "fp16", "head_dim": 80, "tile": Tile(128, 64, 8, 2),
        "function": "f", "num_warps": 8, "shared_bytes": 40 * 1024, "registers": 128, "spills": 0,
        "tensor_core": {"HMMA": 80}, "cubin": b"", "ptx": "",
    }  # fmt: skip
    return CompiledKernel(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 2),  # 128 registers x 256 threads: two blocks fill the register file
        ({"registers": 129}, 1),  # handed out in steps of 8 per thread
        ({"registers": 32}, 2),  # shared memory: 41 KB each of 100 KB
        ({"registers": 32, "shared_bytes": 0}, 6),  # 48 warps, 8 to a block
        ({"sm": 90, "registers": 32, "shared_bytes": 0}, 8),
    ],
)
def test_occupancy_by_hand(changes: dict[str, Any], blocks: int) -> None:
    assert kernel(**changes).blocks_per_sm == blocks


def test_arithmetic_of_one_step() -> None:
    assert kernel().flops_per_step == 2 * 2 * 128 * 64 * 80
    assert kernel().bytes_per_step == 64 * 80 * 2 * 2  # keys and values, two bytes each


def test_table() -> None:
    table = resource_table([kernel(), kernel(op="qk_rotary_embedding", head_dim=0, tile=None, tensor_core={})])
    assert "| varlen_attention | 89 (RTX 40, L4, L40) | fp16 | 80 | 128 x 64, 8 warps | 128 | 0 | 40.0 | 33% |" in table
    assert "| any | 8 warps |" in table


def test_refusals() -> None:
    with pytest.raises(PluginError, match="TRITON_INTERPRET is set"):
        compile_varlen_attention(89, "fp16", 80)
    with pytest.raises(PluginError, match="no such kernel"):
        kernel_module("flash_mla")
