"""The plugins' Triton kernels, compiled ahead of time for GPUs that need not be here.

A kernel per op is the source of truth (`plugins/<op>/kernel.py`). Here each is compiled to a cubin per architecture,
in the best tile that spills no register and fits the shared memory, and what the compiler made of it is read back from
the binary: registers, spills, shared memory, occupancy, and the tensor-core instructions. No GPU, driver or CUDA
toolkit is needed: Triton brings its own assembler and disassembler.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from mmvision_export.core.compute_capability import ComputeCapability
from mmvision_export.core.errors import PluginError
from mmvision_export.core.precision import PRECISIONS
from mmvision_export.kernels.resources import ARCHITECTURES, CompiledKernel, Tile
from mmvision_export.kernels.sass import sass_from_cubin

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "PORTABLE_PTX",
    "compile_kernels",
    "compile_qk_rotary_embedding",
    "compile_varlen_attention",
    "kernel_module",
    "plugins_root",
]

DTYPES = tuple(
    row.name for row in PRECISIONS.values() if row.has_half_attention and not row.is_quantized
)
HEAD_DIMS = tuple(range(16, 129, 16))
"""Head sizes the attention kernel is written for."""

PORTABLE_PTX = ComputeCapability(8, 0)
"""Architecture whose PTX serves later GPUs: from 90 on Triton emits features of one architecture (`sm_90a`), whose PTX
runs on no other."""

# Best first. More queries per program read the keys and values less often; more keys per step rescale the accumulator
# less often. tcgen05 accumulates in tensor memory rather than in registers, which leaves room for 128 keys.
_TILES = (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))
_TILES_TCGEN05 = (Tile(128, 128, 8, 2), *_TILES)


_WARP = 32


def plugins_root() -> Path:
    """The folder `plugins/`, in a checkout or as the wheel carries it.

    Raises:
        PluginError: It is in neither place.
    """
    package = Path(__file__).parents[1]
    for root in (package.parent / "plugins", package / "_plugins"):
        if (root / "varlen_attention" / "kernel.py").is_file():
            return root
    raise PluginError(
        "the folder plugins/ with the kernels' sources is missing",
        hint="install mmvision-export again",
    )


def kernel_module(op: str) -> ModuleType:
    """Import `plugins/<op>/kernel.py`; a kernel's source file must be on disk, for Triton reads it.

    Raises:
        PluginError: There is no such op.
    """
    name = f"mmvision_plugins.{op}"
    if name not in sys.modules:
        path = plugins_root() / op / "kernel.py"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise PluginError(f"{path}: no such kernel")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def compile_kernels(
    compute_capabilities: Sequence[ComputeCapability],
    head_dims: Sequence[int],
    *,
    processes: int | None = None,
) -> Iterator[CompiledKernel]:
    """Compile every kernel for some architectures, several at a time.

    Args:
        compute_capabilities: Of `ARCHITECTURES`.
        head_dims: Of the attention kernel, of `HEAD_DIMS`.
        processes: How many to compile at once; as many as there are cores if None.

    Yields:
        For each architecture and dtype the attention kernel in each head size, then the rotary kernel.

    Raises:
        PluginError: A kernel cannot be compiled.
    """
    jobs = [
        (capability, dtype, head_dim)
        for capability in compute_capabilities
        for dtype in DTYPES
        for head_dim in (*head_dims, 0)
    ]
    # Triton keeps the assembler's paths and versions in the process, and forking after its threads have started hangs.
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_compile_only
    ) as pool:
        try:
            yield from pool.map(_compiled, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile_only() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compiled(job: tuple[ComputeCapability, str, int]) -> CompiledKernel:
    capability, dtype, head_dim = job
    return (
        compile_varlen_attention(capability, dtype, head_dim)
        if head_dim
        else compile_qk_rotary_embedding(capability, dtype)
    )


def compile_varlen_attention(
    compute_capability: ComputeCapability, dtype: str, head_dim: int
) -> CompiledKernel:
    """Compile the attention kernel in the largest tile that spills no register and fits shared memory.

    Raises:
        PluginError: No tile does, or Triton cannot compile for this machine's settings.
    """
    module = kernel_module("varlen_attention")
    architecture = ARCHITECTURES[compute_capability]
    tiles = _TILES_TCGEN05 if architecture.tensor_core == "UTCHMMA" else _TILES
    tried = []
    for tile in tiles:
        parts = dict(zip(("D0", "D1", "D2"), module.head_parts(head_dim), strict=True))
        compiled = _compile(
            module.varlen_attention_kernel,
            op="varlen_attention",
            compute_capability=compute_capability,
            dtype=dtype,
            head_dim=head_dim,
            tile=tile,
            rows=tile.block_m,
            signature={
                **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
                "cu_seqlens_ptr": "*i32",
                **dict.fromkeys(("num_patches", "num_segments", "row_stride"), "i32"),
                "scale_log2": "fp32",
            },
            constants={**parts, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            # TensorRT aligns tensors to 256 bytes, and heads are multiples of 16 channels.
            multiples_of_16=("q_ptr", "k_ptr", "v_ptr", "out_ptr", "row_stride"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if compiled.spills == 0 and compiled.shared_bytes <= architecture.shared_per_block_bytes:
            return compiled
        tried.append(
            f"{tile}: {compiled.spills} spills, {compiled.shared_bytes} bytes of shared memory"
        )
    raise PluginError(
        f"no tile of varlen_attention suits sm_{compute_capability.sm}, {dtype}, "
        f"head_dim {head_dim}: {'; '.join(tried)}"
    )


def compile_qk_rotary_embedding(
    compute_capability: ComputeCapability, dtype: str
) -> CompiledKernel:
    """Compile the rotary kernel, which serves every head_dim.

    Raises:
        PluginError: Triton cannot compile for this machine's settings.
    """
    module = kernel_module("qk_rotary_embedding")
    pointers = ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")
    return _compile(
        module.qk_rotary_embedding_kernel,
        op="qk_rotary_embedding",
        compute_capability=compute_capability,
        dtype=dtype,
        head_dim=0,
        tile=None,
        rows=module.BLOCK_N,
        signature={
            **dict.fromkeys(pointers, f"*{dtype}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **dict.fromkeys(("num_patches", "num_heads", "head_dim", "half"), "i32"),
        },
        constants={"CHANNELS": module.HEAD_BLOCK, "BLOCK_N": module.BLOCK_N},
        multiples_of_16=(*pointers, "cos_ptr", "sin_ptr", "head_dim"),
        num_warps=4,
        num_stages=1,
    )


def _compile(
    kernel: Any,
    *,
    op: str,
    compute_capability: ComputeCapability,
    dtype: str,
    head_dim: int,
    tile: Tile | None,
    rows: int,
    signature: dict[str, str],
    constants: dict[str, int],
    multiples_of_16: tuple[str, ...],
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise PluginError(
            "TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled",
            hint="unset it",
        )
    names = list(kernel.arg_names)
    source = ASTSource(
        kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    # Fused multiply-add said outright: Triton's default is about to change.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        # Line tables are three quarters of a binary, and name folders of the machine it was made on.
        triton.knobs.compilation.disable_line_info = True
        if ARCHITECTURES[compute_capability].cuda == 12:
            # Triton brings two assemblers. Binaries of its newer one need a driver of CUDA 13, and so would shut out
            # most machines with TensorRT 10.
            triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path
        try:
            compiled = triton.compile(
                source, target=GPUTarget("cuda", compute_capability.sm, _WARP), options=options
            )
        except Exception as error:  # Triton's passes raise bare RuntimeErrors
            raise PluginError(
                f"{op} cannot be compiled for sm_{compute_capability.sm}, {dtype}, head_dim {head_dim}: {error}"
            ) from error
    if compiled.metadata.global_scratch_size:
        raise PluginError(
            f"{op} for sm_{compute_capability.sm} needs scratch memory, which its plugin does not provide"
        )
    cubin = compiled.asm["cubin"]
    sass = sass_from_cubin(cubin)
    return CompiledKernel(
        op=op,
        compute_capability=compute_capability,
        dtype=dtype,
        head_dim=head_dim,
        tile=tile,
        rows=rows,
        function=compiled.metadata.name,
        # Triton may add warps to those it is asked for, to specialise them.
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=sass.registers,
        spills=sass.spills,
        tensor_core=sass.tensor_core,
        cubin=cubin,
        ptx=compiled.asm["ptx"],
    )
